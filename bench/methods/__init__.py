"""`python -m bench methods`: which methods of the library beat MeZO on real tasks, at equal forwards?

    command.py      which methods and cells; the runs are `bench/quality`'s (beds, rates, seeds, resuming)
    table.py        rows -> a table per cell with a plain verdict
    picture.py      methods.png
"""
