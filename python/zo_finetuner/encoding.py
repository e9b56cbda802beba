"""From a row to token ids, and from several of those to one batch, packed or padded.

An option is scored at the tokens it adds to the end of the prompt: their number is the length of the
verbalised text minus the length of the prompt alone, both tokenised whole (MeZO, Malladi et al. 2023). The
last token of a sequence is only ever a target, so it is never fed: batches are one token shorter than the
sequences.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.packing import Document, fill_few_shapes, fill_rows, grow, lay_out, power_of_two
from zo_finetuner.tasks import Task
from zo_finetuner.tasks.templates import Row

MAX_NEW_TOKENS = 50  # of a generated answer; a generation task's inputs leave room for them
IGNORED = -100

Candidate = tuple[tuple[int, ...], tuple[int, ...]]  # token ids, and the targets at their end (IGNORED: no target)


@dataclass(frozen=True)
class Encoded:
    """One row as token ids: a sequence (prompt and option) per candidate, each ending in option_lengths[c]
    option tokens. labels are the correct candidates; training uses the first. A generation task has the gold
    answer as its only candidate, and besides the prompt alone and the gold texts. cut is the number of tokens
    truncated. unscored are places in the only sequence, within its option, that are no targets: other speakers' turns.
    row is what it was made of, for objectives that look at it."""

    kind: str
    sequences: tuple[tuple[int, ...], ...]
    option_lengths: tuple[int, ...]
    labels: tuple[int, ...]
    prompt: tuple[int, ...]
    answers: tuple[str, ...] = ()
    cut: int = 0
    unscored: frozenset[int] = frozenset()
    row: Row | None = field(default=None, compare=False, repr=False)

    @property
    def shares_prompt(self) -> bool:
        """Whether every candidate is a single token after one common prompt, so that one forward scores them
        all."""
        head = self.sequences[0][:-1]
        return all(n == 1 for n in self.option_lengths) and all(s[:-1] == head for s in self.sequences)

    def candidate(self, c: int) -> Candidate:
        """A sequence, and its last tokens, the option, as targets."""
        sequence = self.sequences[c]
        places = range(len(sequence) - self.option_lengths[c], len(sequence))
        return sequence, tuple(IGNORED if i in self.unscored else sequence[i] for i in places)


def encode(task: Task, row: Row, tokenizer: Any, max_length: int = 2048) -> Encoded:
    """Tokenise one row.

    The prompt is stripped of its trailing spaces, the whole text of leading white space. Sequences longer
    than max_length lose tokens on their left, behind whatever the tokenizer puts first (BOS). Generation
    tasks keep MAX_NEW_TOKENS free. `encode_rows` warns about truncation.

    max_length is the caller's to keep within the model's context (`context_length`).
    Raises InputError where an option adds no token, or max_length leaves no room for a prompt.
    """
    limit = max_length - (MAX_NEW_TOKENS if task.kind == "generation" else 0)
    leading, _ = special_tokens(tokenizer)
    if limit < leading + 2:
        raise InputError(
            f'max_length {max_length} leaves {max(limit, 0)} tokens for a row of task "{task.name}"; '
            f"it needs {max_length - limit + leading + 2} or more"
        )
    prompt = task.prompt(row)
    bare = text_tokens(tokenizer, prompt.rstrip(" ").lstrip())
    sequences, lengths, cut = [], [], 0
    for candidate in task.candidates(row):
        ids = text_tokens(tokenizer, (prompt + candidate).strip(" ").lstrip())
        if len(ids) <= len(bare):
            raise InputError(
                f'task "{task.name}": the option {candidate!r} adds no token to its prompt '
                f"({len(bare)} tokens without it, {len(ids)} with it); use another tokenizer or label word"
            )
        kept = cut_left(ids, limit, leading)
        cut = max(cut, len(ids) - len(kept))
        sequences.append(kept)
        # An option that fills the whole length still needs one token before it.
        lengths.append(min(len(ids) - len(bare), len(kept) - 1))
    label = task.label(row)
    return Encoded(
        kind=task.kind,
        sequences=tuple(sequences),
        option_lengths=tuple(lengths),
        labels=(label,) if isinstance(label, int) else tuple(label),
        prompt=cut_left(bare, limit, leading),
        answers=tuple(task.answers(row)),
        cut=cut,
        row=row,
    )


def encode_rows(task: Task, rows: Iterable[Row], tokenizer: Any, max_length: int = 2048) -> list[Encoded]:
    """`encode` every row; one warning counts the rows that were truncated. Errors name the row, from 0."""
    encodeds = []
    for i, row in enumerate(rows):
        try:
            encodeds.append(encode(task, row, tokenizer, max_length))
        except InputError as error:
            raise InputError(f"row {i} (from 0): {error}") from None
    cuts = [e.cut for e in encodeds if e.cut]
    if cuts:
        warnings.warn(
            f"{len(cuts)} of {len(encodeds)} {task.name} rows exceed {max_length} tokens and lost up to "
            f"{max(cuts)} tokens on the left",
            stacklevel=2,
        )
    return encodeds


def context_length(model: Any, most: int = 2048) -> int:
    """Longest sequence to feed: the model's positions, but never more than `most`, which is the protocol's 2048."""
    config = model.config.get_text_config()
    return min(most, getattr(config, "max_position_embeddings", None) or most)


def pad_token(tokenizer: Any) -> int:
    """An id for padding; any will do, since padding is masked and never a target."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def collate(
    encodeds: Sequence[Encoded],
    pad_id: int,
    *,
    packed: bool = False,
    multiple_of: int = 8,
    gold_only: bool | None = None,
    few_shapes: bool = False,
) -> dict[str, Tensor]:
    """One batch for `objective`, as int64 and bool tensors on the CPU.

    packed: examples share rows (`packing`), and candidates of several tokens their prompt. For models that keep
    them apart: pass `isolation.can_pack(model)`. Otherwise every sequence has a row of its own, padded behind.
    T is a multiple of `multiple_of`.
    few_shapes: padded more coarsely (`packing`), for graphs of whole steps; the loss is the same.

    Always there: input_ids, position_ids (N, T), and where logits are wanted: places (N, K), chosen (M,); with a
    row that several share also trunks, branches (N, T) (`packing.lay_out`). With gold_only (the default but for
    classification) of S = B sequences, each row's first correct option,
        targets (S, L)  option tokens, right-aligned, IGNORED before them and where unscored; L is the longest option,
                        with few_shapes a power of two beyond it
        counted (M,)    flat indices of the M real targets, in the order of the labels; with few_shapes ends in zeros,
                        which is no target's place
    Otherwise S counts all candidates of all B rows, and there are besides
        members (B, C)  which sequence is candidate c of row b
        valid (B, C)    whether b has a candidate c
        gold (B,)       the correct candidate
    or, where every candidate of every row is one token after a common prompt, the label is the prompt's last token,
    M = B, there are no targets, and
        candidates (V,) the distinct option tokens, sorted            members (B, C) index into candidates
    """
    if gold_only is None:
        gold_only = encodeds[0].kind != "classification"
    if gold_only:
        gold = [[e.candidate(e.labels[0])] for e in encodeds]
        return collate_options(gold, pad_id, packed=packed, multiple_of=multiple_of, few_shapes=few_shapes)

    counts = torch.tensor([len(e.sequences) for e in encodeds])
    valid = torch.arange(int(counts.max())) < counts[:, None]
    members = torch.zeros(valid.shape, dtype=torch.int64)
    if all(e.shares_prompt for e in encodeds):
        prompts = [Document(e.sequences[0][:-1]) for e in encodeds]
        labels = [(i, 0, len(prompt) - 1) for i, prompt in enumerate(prompts)]
        batch = _lay_out(prompts, labels, pad_id, packed, multiple_of, few_shapes)
        options = torch.tensor([s[-1] for e in encodeds for s in e.sequences])
        batch["candidates"], members[valid] = options.unique(return_inverse=True)
    else:
        candidates = [[e.candidate(c) for c in range(len(e.sequences))] for e in encodeds]
        batch = collate_options(candidates, pad_id, packed=packed, multiple_of=multiple_of, few_shapes=few_shapes)
        members[valid] = torch.arange(batch["targets"].shape[0])
    gold = torch.tensor([e.labels[0] for e in encodeds])
    return batch | {"members": members, "valid": valid, "gold": gold}


def collate_options(
    groups: Sequence[Sequence[Candidate]],
    pad_id: int,
    *,
    packed: bool = False,
    multiple_of: int = 8,
    few_shapes: bool = False,
) -> dict[str, Tensor]:
    """`collate` for groups of candidates, S in all; those of a group share their prompt in a packed batch."""
    documents, labels = [], []
    for group in groups:
        fed = [sequence[:-1] for sequence, _ in group]
        targets = iter(option for _, option in group)
        for document in grow(fed) if packed else map(Document, fed):
            for path, end in enumerate(document.ends):
                option = next(targets)
                # The token before the option predicts its first, and so on: the last that are fed.
                places = range(end - len(option), end)
                labels += [(len(documents), path, p) for p, t in zip(places, option, strict=True) if t != IGNORED]
            documents.append(document)
    options = [option for group in groups for _, option in group]
    longest = max(map(len, options))
    width = power_of_two(longest + 1, 64) if few_shapes else longest
    targets = torch.tensor([[IGNORED] * (width - len(option)) + list(option) for option in options])
    batch = _lay_out(documents, labels, pad_id, packed, multiple_of, few_shapes)
    counted = (targets != IGNORED).flatten().nonzero().flatten()
    return batch | {"targets": targets, "counted": F.pad(counted, (0, len(batch["chosen"]) - len(counted)))}


def _lay_out(
    documents: list[Document], labels: list[tuple[int, int, int]], pad_id: int, packed: bool, multiple_of: int,
    few_shapes: bool,
) -> dict[str, Tensor]:
    sizes = [len(document) for document in documents]
    fill = fill_few_shapes if few_shapes else fill_rows
    rows = fill(sizes, multiple_of) if packed else [[i] for i in range(len(sizes))]
    return lay_out(documents, rows, labels, pad_id, multiple_of, few_shapes)


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, multiple_of: int = 8) -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids (N, T), int64; a padded row's positions start at its first
    token."""
    longest = max(len(s) for s in sequences)
    shape = (len(sequences), -(-longest // multiple_of) * multiple_of)
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        input_ids[i, -len(sequence) :] = torch.tensor(sequence)
        attention_mask[i, -len(sequence) :] = 1
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> tuple[int, int]:
    """How many tokens the tokenizer puts before and after every text (BOS; some add EOS).

    Asked of the tokenizer's output: `add_bos_token` is missing or wrong on several fast tokenizers (Llama
    3)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for before in range(len(full) - len(plain) + 1):
        if full[before : before + len(plain)] == plain:
            return before, len(full) - len(plain) - before
    raise InputError(f"{type(tokenizer).__name__} changes a text's own tokens when it adds special ones")


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[: len(ids) - special_tokens(tokenizer)[1]]


def cut_left(ids: list[int], limit: int, leading: int) -> tuple[int, ...]:
    if len(ids) <= limit:
        return tuple(ids)
    return tuple(ids[:leading] + ids[len(ids) - (limit - leading) :])
