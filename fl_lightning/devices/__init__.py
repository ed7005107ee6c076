"""Devices of clients: compute, battery, network and availability; who may work, and what becomes of it."""

from fl_lightning.devices.buffer import DeviceBuffer
from fl_lightning.devices.classes import DeviceClasses
from fl_lightning.devices.conditions import Conditions
from fl_lightning.devices.device import Device
from fl_lightning.devices.distributions import Choice, Distribution, LogNormal, LogUniform, Normal, Uniform
from fl_lightning.devices.eligibility import (
    AllOf,
    BatteryAtLeast,
    Charging,
    Eligibility,
    Idle,
    LocalHours,
    MemoryAtLeast,
    Online,
    QualityAtLeast,
    Rule,
    Satisfies,
    Unmetered,
)
from fl_lightning.devices.energy import EnergyModel
from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.devices.participants import Participants
from fl_lightning.devices.policies import AdaptiveEpochs, AdaptiveWidth, Circumstances, DeadlineSteps, WorkPolicy
from fl_lightning.devices.rounds import DeviceRounds
from fl_lightning.devices.samplers import FairSampler, OortSampler

__all__ = [
    "AdaptiveEpochs",
    "AdaptiveWidth",
    "AllOf",
    "BatteryAtLeast",
    "Charging",
    "Choice",
    "Circumstances",
    "Conditions",
    "DeadlineSteps",
    "Device",
    "DeviceBuffer",
    "DeviceClasses",
    "DeviceFleet",
    "DeviceRounds",
    "Distribution",
    "Eligibility",
    "EnergyModel",
    "FairSampler",
    "Idle",
    "LocalHours",
    "LogNormal",
    "LogUniform",
    "MemoryAtLeast",
    "Normal",
    "Online",
    "OortSampler",
    "Participants",
    "QualityAtLeast",
    "Rule",
    "Satisfies",
    "Uniform",
    "Unmetered",
    "WorkPolicy",
]
