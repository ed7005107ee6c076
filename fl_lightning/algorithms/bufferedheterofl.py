"""HeteroFL without rounds in step: narrow models in a buffer of updates."""

from __future__ import annotations

from fl_lightning.algorithms.fedbuff import FedBuff
from fl_lightning.algorithms.heterofl import HeteroFL

__all__ = ["BufferedHeteroFL"]


class BufferedHeteroFL(HeteroFL, FedBuff):
    r"""Clients of different width, and nobody waits: :class:`HeteroFL`'s mean of an entry in :class:`FedBuff`'s rounds.

    .. math:: w_{t+1}[e] = w_t[e] + \eta \, \frac{\sum_{k:\,e \in S_k} n_k\, s(\tau_k)\, \delta_k[e]}
        {\sum_{k:\,e \in S_k} n_k}

    The sums are over the updates of a buffer. A client's width is chosen when it is sent its work, and it is sent that
    part of the model of that moment. As in FedBuff the discount :math:`s` of a stale update shortens the step, and is
    not in the denominator. An entry that nobody of a buffer holds stays as it is. With a buffer of one update, and
    ``server_lr`` as the mixing weight, it is :class:`FedAsync` for clients of different width.

    With everyone at width 1 it is FedBuff, and with a buffer of everyone, who are equally fast, HeteroFL.

    Args:
        buffer_size: as in :class:`FedBuff`; so are the others.

    Example:
        >>> algorithm = BufferedHeteroFL(buffer_size=10, concurrency=50)
        >>> algorithm.asynchronous, algorithm.schedule().buffer_size
        (True, 10)

    References:
        Diao et al., *HeteroFL*, 2021, equations 1 to 4; Nguyen et al., *Federated Learning with Buffered Asynchronous
        Aggregation*, 2022, algorithm 1. Neither paper has the other's part.
    """
