"""What updates pass through between client and server."""

from fl_lightning.transforms.base import Exchange, Payload, Template, Transform, TreeTransform
from fl_lightning.transforms.chaining import Chain, chain
from fl_lightning.transforms.codec import Codec, PackedSize
from fl_lightning.transforms.eden import Eden
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.feedback import ErrorFeedback
from fl_lightning.transforms.inbox import Inbox
from fl_lightning.transforms.powersgd import PowerSGD
from fl_lightning.transforms.quantize import Cast, Quantize, Sign
from fl_lightning.transforms.sparse import RandomK, TopK

__all__ = [
    "Cast",
    "Chain",
    "Codec",
    "Eden",
    "ErrorFeedback",
    "Exchange",
    "Inbox",
    "PackedSize",
    "Payload",
    "PayloadError",
    "PowerSGD",
    "Quantize",
    "RandomK",
    "Sign",
    "Template",
    "TopK",
    "Transform",
    "TreeTransform",
    "chain",
]
