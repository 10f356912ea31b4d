"""Figures of devices, and the times of kernels and collectives that follow from them.

docs/planner.md has the sources and the assumptions.
"""
from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import kernels_npu
from common import UsageError

MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, LINK_EFFICIENCY = 0.75, 0.8, 0.8  # reached shares of the data sheets' figures
LATENCY, HOP_IN_NODE, HOP_BETWEEN_NODES = 8.4e-6, 3.4e-6, 14e-6  # seconds of a collective, and of each step of its ring


class Device(NamedTuple):
    """Figures of a device: bandwidths are in one direction, in 1e9 bytes per second."""

    tflops: float  # dense bf16
    memory_gib: float
    memory_gbs: float
    link_gbs: float  # to the other devices of its node
    network_gbs: float  # to other nodes
    devices_per_node: float
    host_gbs: float  # to the host's memory
    host_memory_gbs: float  # of the host's memory, this device's share

    def kernel(self, flops: float, nbytes: float) -> tuple[str, float]:
        """Return which resource limits a kernel, and its seconds."""
        compute, memory = flops / (self.tflops * 1e12 * MATMUL_EFFICIENCY), self.elementwise(nbytes)
        return ("compute", compute) if compute > memory[1] else memory

    def elementwise(self, nbytes: float, on_host: bool = False) -> tuple[str, float]:
        """Return the same of a kernel that only moves bytes, on this device or on its host."""
        bandwidth = self.host_memory_gbs if on_host else self.memory_gbs
        return "host memory" if on_host else "memory bandwidth", nbytes / (bandwidth * 1e9 * MEMORY_EFFICIENCY)

    def all_to_all(self, nbytes: float, calls: float, size: int) -> float:
        """Return the seconds in which each of `size` neighbours sends `nbytes` in equal parts to all, in some calls."""
        near = min(size, self.devices_per_node)
        links = nbytes / (1e9 * LINK_EFFICIENCY)
        seconds = max(links * (near - 1) / size / self.link_gbs, links * (1 - near / size) / self.network_gbs)
        return seconds + calls * (LATENCY + (HOP_BETWEEN_NODES if size > near else HOP_IN_NODE))

    def ring(self, nbytes: float, size: int, stride: int) -> float:
        """Return the seconds of an all-gather or reduce-scatter of a tensor of `nbytes` over every `stride`-th rank.

        Every byte enters each node once, through the network links of all devices of the group in that node.
        """
        if size == 1:
            return 0.0
        near = min(size, max(1, self.devices_per_node // stride))
        nodes = size / near
        links = nbytes / (1e9 * LINK_EFFICIENCY)
        inside = links * (size - 1) / size / self.link_gbs if near > 1 else 0.0
        between = links * (1 - 1 / nodes) / (near * self.network_gbs)
        hops = (size - nodes) * HOP_IN_NODE + (nodes - 1) * HOP_BETWEEN_NODES
        return max(inside, between) + LATENCY + hops

    def host_copy(self, nbytes: float) -> float:
        """Return the seconds of a copy to or from the host's memory."""
        return nbytes / (self.host_gbs * 1e9 * LINK_EFFICIENCY)


DEVICES = {  # the first is the default of --assume-device
    "ascend-910b": Device(354, 64, 1600, 196, 25, 8, 32, 93),
    "ascend-910c": Device(354, 64, 1600, 196, 25, 16, 32, 46),
    "a100": Device(312, 80, 2039, 300, 25, 8, 32, 51),
    "h100": Device(989, 80, 3350, 450, 50, 8, 64, 77),
    "h200": Device(989, 141, 4800, 450, 50, 8, 64, 77),
}
FUSIBLE = ("rms_norm", "rotary", "swiglu", "moe_permute", "moe_unpermute", "attention_flash")  # may be one kernel


def assumed_device(args: argparse.Namespace) -> tuple[str, Device]:
    """Return the name of --assume-device and its figures, with those of --device-figures.

    Raises UsageError for unknown ones.
    """
    name = args.assume_device or next(iter(DEVICES))
    if name not in DEVICES:
        raise UsageError(f"--assume-device {name}: give one of {', '.join(DEVICES)}")
    device = DEVICES[name]
    for pair in filter(None, (args.device_figures or "").split(",")):
        figure, _, text = pair.strip().partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if figure not in Device._fields or not 0 < value < math.inf:
            raise UsageError(f"--device-figures {pair}: give NAME=NUMBER above 0, where NAME is one of "
                             f"{', '.join(Device._fields)}")
        device = device._replace(**{figure: value})
    return name, device


def fused_operations(device: str) -> set[str]:
    """Return the operations that `kernels_npu` runs as one kernel on a device. A dry run has sdpa for flash."""
    kernels = kernels_npu.Npu if device.startswith("ascend") else kernels_npu.Cuda
    return {"attention_sdpa" if name == "attention_flash" else name for name in FUSIBLE if name in vars(kernels)}
