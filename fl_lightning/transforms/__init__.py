"""What updates pass through between client and server."""

from fl_lightning.transforms.base import Broadcast, Exchange, Payload, Template, Transform, TreeTransform
from fl_lightning.transforms.cast import Cast
from fl_lightning.transforms.chaining import Chain, all_transforms, chain
from fl_lightning.transforms.codec import Codec, PackedSize
from fl_lightning.transforms.deadzone import DeadZone
from fl_lightning.transforms.downlink import CompressedBroadcast
from fl_lightning.transforms.eden import Eden
from fl_lightning.transforms.eigenbasis import Eigenbasis
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.feedback import ErrorFeedback
from fl_lightning.transforms.powersgd import PowerSGD
from fl_lightning.transforms.quantize import Quantize, Sign
from fl_lightning.transforms.server_codec import TRANSFORMS, ServerCodec
from fl_lightning.transforms.sparse import RandomK, TopK

__all__ = [
    "TRANSFORMS",
    "Broadcast",
    "Cast",
    "Chain",
    "Codec",
    "CompressedBroadcast",
    "DeadZone",
    "Eden",
    "Eigenbasis",
    "ErrorFeedback",
    "Exchange",
    "PackedSize",
    "Payload",
    "PayloadError",
    "PowerSGD",
    "Quantize",
    "RandomK",
    "ServerCodec",
    "Sign",
    "Template",
    "TopK",
    "Transform",
    "TreeTransform",
    "all_transforms",
    "chain",
]
