"""Train, dev and test rows of one's own data: as given, or held out of the training rows by a seed.

    split   comes from                                                         rows
    train   --data: a file, the train split of a folder or Hub dataset         all that are not held out
    dev     --dev-data, else the validation split of --data, else held out     all, or 10 % of train, 500 at most
    test    --test-data, else the test split of --data, else held out          all, or 10 % of train, 1,000 at most

The training rows are permuted under RandomState(seed): the first are dev, the next test, the rest train, so that what
is held out does not depend on how many are trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from zo_finetuner.data import Splits, permutation
from zo_finetuner.errors import InputError
from zo_finetuner.own.files import Source, read_source
from zo_finetuner.own.formats import Format, OwnRow, check_columns, check_rows

SHARE = 10  # one row of so many is held out, for dev and for test each
MOST = {"dev": 500, "test": 1000}


def load_own(
    data: str | None,
    dev_data: str | None = None,
    test_data: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    num_train: int | None = None,
    num_dev: int | None = None,
    num_eval: int | None = None,
    prompts: bool = False,
) -> tuple[Splits, Format]:
    """Rows of a user's own data (`OwnRow`), checked, and their format, one for all splits.

    data, dev_data, test_data: what `files.read_source` takes; of a folder or Hub dataset as dev_data or test_data that
    split is read.  Without data there is a test split only.  columns: {name of a format's column: the data's name}.
    prompts: whether prompts without completions will do.
    Raises InputError for what cannot be read, the first row at fault, and fewer rows than are to be held out."""
    columns = dict(columns or {})
    check_columns(columns)
    if not 0 <= seed < 2**32:
        raise InputError(f"data seed {seed} is out of range; use 0 to {2**32 - 1}")
    sizes = {"train": num_train, "dev": num_dev, "test": num_eval}
    for split, size in sizes.items():
        if size is not None and size < 1:
            raise InputError(f"{size} {split} rows were asked for; ask for 1 or more")
    found = _sources(data, dev_data, test_data)
    known, rows = None, {}
    for split, source in found.items():
        known, rows[split] = check_rows(source.rows, columns, known)
        if known[1].name == "prompt" and not prompts:
            raise InputError(f"{known[0]}: has a prompt but no completion, which only an --objective can do without; "
                             f"name the column with --columns completion=COLUMN")
    origin = {split: source.origin for split, source in found.items()}
    index = {split: permutation(len(rows[split]), seed)[: sizes[split]] for split in found if split != "train"}
    if "train" in found:
        missing = [split for split in ("dev", "test") if split not in found]
        index |= _hold_out(found["train"].origin, len(rows["train"]), missing, sizes, seed)
        origin |= dict.fromkeys(missing, origin["train"])
    chosen = {split: [rows.get(split, rows.get("train"))[i] for i in index.get(split, ())] for split in sizes}
    _tell_of_shared(chosen)
    return Splits(**chosen, origin=origin, index=index), known[1]


def _sources(data: str | None, dev_data: str | None, test_data: str | None) -> dict[str, Source]:
    found: dict[str, Source] = {}
    if data is not None:
        given = read_source(data)
        if "" in given:
            given = {"train": given[""]}
        if "train" not in given:
            raise InputError(f"{data}: has no train split but {', '.join(given)}")
        found |= given
    for split, source in (("dev", dev_data), ("test", test_data)):
        if source is not None:
            given = read_source(source)
            one = given.get(split) or given.get("")
            if one is None:
                raise InputError(f"{source}: has no {split} split but {', '.join(given)}; give its file")
            found[split] = one
    return found


def _hold_out(
    origin: str, available: int, missing: list[str], sizes: Mapping[str, int | None], seed: int
) -> dict[str, list[int]]:
    order, index, first = permutation(available, seed), {}, 0
    for split in missing:
        asked = sizes[split]
        count = min(MOST[split], max(1, available // SHARE)) if asked is None else asked
        index[split] = order[first : first + count]
        first += count
    if first >= available:
        raise InputError(f"{origin}: {available} rows are too few to hold out {first} and train on the rest; give "
                         f"more, or --dev-data and --test-data, or smaller --num-dev and --num-eval")
    rest = order[first:]
    if (sizes["train"] or 0) > len(rest):
        warnings.warn(f"{origin}: {len(rest)} rows are left to train on, {sizes['train']} were asked for", stacklevel=3)
    return index | {"train": rest[: sizes["train"]]}


def _tell_of_shared(chosen: Mapping[str, list[OwnRow]]) -> None:
    """A row that is held out and trained on makes the held-out loss too good."""
    trained = {repr(row) for _, row in chosen["train"]}
    for split in ("dev", "test"):
        shared = sum(repr(row) in trained for _, row in chosen[split])
        if shared:
            warnings.warn(f"{shared} of {len(chosen[split])} {split} rows are training rows too: what is measured on "
                          f"them is not held out", stacklevel=3)
