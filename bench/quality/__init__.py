"""`python -m bench quality`: do learned per-block scales beat MeZO and the honest controls, at equal forwards?

    cells.py        model x deployment: which rows, how many steps, which learning set it never saw
    bed.py          a model on a cell's rows: one run of any method by the library's engine, or of first-order Adam
    artefacts.py    what is learned once per model: the paper's recipe, the closed form, the improved recipe
    jobs.py         a method on a cell: rates tuned on dev rows, then fresh seeds on held-out rows; resumes run by run
    command.py      the order of jobs, and what other comparisons share (`bench/methods`)
    work.py         minutes that are left, and the jobs carried out, two processes at a time
    verdict.py      rows -> cells: learnable, won, forwards to MeZO's loss, outside the seeds' spread
    picture.py      quality.png
    pretrain.py     a better base, where a GPU is at hand
"""
