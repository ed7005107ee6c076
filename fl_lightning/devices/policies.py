"""How much a device is asked to do: less on a low battery, less before a deadline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fl_lightning.devices.checks import is_number
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId, Work

__all__ = [
    "AdaptiveEpochs",
    "AdaptiveWidth",
    "Circumstances",
    "DeadlineSteps",
    "WorkPolicy",
    "adapted",
    "checked_policies",
]


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a policy may look at.

    Args:
        client_id: who is asked.
        battery: level in [0, 1].
        charging: whether it is on the charger.
        num_steps: optimizer steps that the work takes as it is.
        step_seconds: seconds of one step on this device.
        travel_seconds: seconds that the model and the update travel.
        seconds_left: until the round's deadline; infinite without one.
        memory_gb: memory in GB.
    """

    client_id: ClientId
    battery: float
    charging: bool
    num_steps: int
    step_seconds: float
    travel_seconds: float
    seconds_left: float
    memory_gb: float = math.inf


class WorkPolicy:
    """Changes the work of a device by its circumstances. It is pure: the next round starts from the full work again."""

    def adapt(self, work: Work, now: Circumstances) -> Work:
        """Return the work that is asked instead: at least one epoch or step. Whom to ask, eligibility decides."""
        raise NotImplementedError(f"{type(self).__name__} must define adapt(work, now).")


class AdaptiveEpochs(WorkPolicy):
    """Less local work on a low battery, the full work again once it is charged.

    Below ``threshold`` a device is asked for ``factor`` of its epochs (or steps), rounded down, at least one.

    Args:
        threshold: battery level in [0, 1].
        factor: part of the work that is left, in (0, 1].

    Raises:
        MisconfigurationException: for numbers outside of these ranges.

    Example:
        >>> low = Circumstances("a", 0.4, False, num_steps=50, step_seconds=1, travel_seconds=0, seconds_left=9)
        >>> AdaptiveEpochs().adapt(Work(epochs=5), low).epochs, AdaptiveEpochs().adapt(Work(epochs=1), low).epochs
        (2, 1)
    """

    def __init__(self, threshold: float = 0.5, factor: float = 0.5) -> None:
        numbers = is_number(threshold) and is_number(factor)
        if not numbers or not 0 <= threshold <= 1 or not 0 < factor <= 1:
            raise MisconfigurationException(
                f"AdaptiveEpochs expected threshold in [0, 1] and factor in (0, 1], got threshold={threshold!r} and "
                f"factor={factor!r}."
            )
        self.threshold, self.factor = threshold, factor

    def adapt(self, work: Work, now: Circumstances) -> Work:
        if now.battery >= self.threshold:
            return work
        if work.steps is not None:
            return replace(work, steps=max(1, int(work.steps * self.factor)))
        return replace(work, epochs=max(1, int((work.epochs or 1) * self.factor)))


class DeadlineSteps(WorkPolicy):
    """As many steps as fit before the round's deadline, on this device and with this network; never more than asked.

    A device that cannot finish one step gets its work as it is, and will miss the deadline.

    Args:
        margin: part of the time that is left free for what the estimate does not know, in [0, 1).

    Raises:
        MisconfigurationException: for a margin outside of [0, 1).

    Example:
        >>> now = Circumstances("a", 1.0, False, num_steps=50, step_seconds=0.5, travel_seconds=2, seconds_left=12)
        >>> work = DeadlineSteps(margin=0).adapt(Work(epochs=5), now)
        >>> work.steps, work.partial
        (20, True)
    """

    def __init__(self, margin: float = 0.1) -> None:
        if not is_number(margin) or not 0 <= margin < 1:
            raise MisconfigurationException(f"DeadlineSteps expected margin in [0, 1), got {margin!r}.")
        self.margin = margin

    def adapt(self, work: Work, now: Circumstances) -> Work:
        if math.isinf(now.seconds_left):
            return work
        left = now.seconds_left * (1 - self.margin) - now.travel_seconds
        # the smallest of fractions forgives a quotient that misses its integer by rounding
        steps = now.num_steps if now.step_seconds <= 0 else int(left / now.step_seconds + 1e-9)
        if steps >= now.num_steps or steps < 1:
            return work
        return replace(work, epochs=None, steps=steps, partial=True)


class AdaptiveWidth(WorkPolicy):
    """A narrower model where the whole one does not fit into a device's memory; for ``HeteroFL``, in rounds in step.

    Widths are 1, 1/2, 1/4 and so on down to ``smallest``; a device gets the largest whose need, ``width * memory_gb``,
    it meets, and ``smallest`` when it meets none. On the virtual clock and for its battery a step then takes the square
    of the width, as products of two cut sides do; the uncut input and output make a real one a little dearer.

    Args:
        memory_gb: what training the whole model needs, in GB, > 0.
        smallest: least width, in (0, 1].

    Raises:
        MisconfigurationException: for numbers outside of these ranges.

    Example:
        >>> small = Circumstances("a", 1.0, False, 50, 1.0, 2.0, seconds_left=90, memory_gb=3.0)
        >>> AdaptiveWidth(memory_gb=6.0).adapt(Work(epochs=5), small).width
        0.5

    References:
        Diao et al., *HeteroFL*, 2021, section 4: its levels a to e are widths 1 to 1/16.
    """

    def __init__(self, memory_gb: float, smallest: float = 0.0625) -> None:
        numbers = is_number(memory_gb) and is_number(smallest)
        if not numbers or not 0 < memory_gb < math.inf or not 0 < smallest <= 1:
            raise MisconfigurationException(
                f"AdaptiveWidth expected memory_gb > 0 and smallest in (0, 1], got memory_gb={memory_gb!r} and "
                f"smallest={smallest!r}."
            )
        self.memory_gb, self.smallest = memory_gb, smallest

    def adapt(self, work: Work, now: Circumstances) -> Work:
        width = 1.0
        while width > self.smallest and width * self.memory_gb > now.memory_gb:
            width = max(width / 2, self.smallest)
        return replace(work, width=min(work.width, width))


def checked_policies(of: str, policies: Any) -> list[WorkPolicy]:
    """Return a schedule's policies as a list of its own.

    Args:
        of: the schedule, for the error.
        policies: what it was given; ``None`` is none.

    Raises:
        MisconfigurationException: for one policy without a list around it, and for what is no policy.
    """
    if policies is None:
        return []
    found: list[Any] = list(policies) if isinstance(policies, list | tuple) else [None]
    if not all(isinstance(policy, WorkPolicy) for policy in found):
        raise MisconfigurationException(
            f"{of} expected policies to be a list of policies such as [AdaptiveEpochs()], got {policies!r}. A function "
            "becomes one as the adapt(work, now) of a subclass of WorkPolicy."
        )
    return found


def adapted(
    work: Work, now: Circumstances, policies: Sequence[WorkPolicy], num_steps: Callable[[Work], int]
) -> tuple[Work, int]:
    """Return the work after several policies, each of which sees what the one before it left, and its steps.

    Raises:
        MisconfigurationException: names the policy and the client, when it raises or returns what is no work.
    """
    for policy in policies:
        changed = _asked(policy, work, now)
        if changed != work:
            step_seconds = now.step_seconds * (changed.width / work.width) ** 2
            work, now = changed, replace(now, num_steps=num_steps(changed), step_seconds=step_seconds)
    return work, now.num_steps


def _asked(policy: WorkPolicy, work: Work, now: Circumstances) -> Work:
    name = f"{type(policy).__name__}.adapt"
    try:
        changed = policy.adapt(work, now)
    except NotImplementedError:
        raise
    except Exception as error:
        raise MisconfigurationException(
            f"{name} raised {error!r} for client {now.client_id!r}. It gets a Work and the Circumstances, and "
            "returns a Work; mend it."
        ) from error
    if not isinstance(changed, Work):
        raise MisconfigurationException(
            f"{name} expected to return a Work for client {now.client_id!r}, got {changed!r}. Return the work that it "
            "got where nothing changes, or dataclasses.replace(work, ...)."
        )
    amount = changed.epochs if changed.steps is None else changed.steps
    whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
    if not whole or not 0 < changed.width <= 1:
        raise MisconfigurationException(
            f"{name} expected to return epochs or steps as an integer >= 1 and a width in (0, 1] for client "
            f"{now.client_id!r}, got epochs={changed.epochs!r}, steps={changed.steps!r} and width={changed.width!r}. "
            "To send a device no work, write an eligibility rule."
        )
    return changed
