"""Learning to learn: `zo learn` makes a learned optimizer for a base model, `zo show` draws one.

    streaming.py     theta' in place and back; backward passes that hold few gradients at a time
    trajectory.py    how the paper moves the base model between meta steps
    paper.py         the published recipe, faithfully
    profile.py       where a two-point step gains and what its noise costs, block by block
    improved.py      the recipe that learns
    closed_form.py   scales from a few backward passes, without learning
    forward_only.py  the same from forward passes alone
    scoring.py       the meta loss on held-out rows
    sources.py       tasks, and plain text (text.py), as learning sets
    base.py          the base model's own weights, from its files
    learner.py       the loop: windows, divergence, what a resume needs
    settings.py      what `zo learn` can be told
    run.py           the whole job; checkpoint.py, its state on disk
    show.py          the card in words and the scales as a picture
    command.py       the command line's verbs
"""
