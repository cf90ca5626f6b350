"""The compilers of devices that this machine lacks, and the meshes that they compile for."""

import importlib.metadata
import os
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

WHEELS = {
    "gpu": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
    "tpu": ("libtpu",),
}
# XLA's `GpuTargetConfigProto` of an H100 SXM: what it would ask the driver for if one were there.
H100 = {
    "gpu_device_info": {
        "cuda_compute_capability": {"major": 9, "minor": 0},
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 84_942_979_072,
        "memory_bandwidth": 3_352_320_000_000,
        "l2_cache_size": 52_428_800,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_block_optin": 232_448,
        "shared_memory_per_core": 233_472,
        "registers_per_block_limit": 65_536,
        "registers_per_core_limit": 65_536,
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "runtime_version": "12.9.0",
        "driver_version": "12.9.0",
    },
    "dnn_version_info": {"major": 9, "minor": 10},
    "platform_name": "CUDA",
    "device_description_str": "NVIDIA H100 80GB HBM3",
}


EVERYWHERE = P()


class Target(NamedTuple):
    """Devices to compile for: one of a topology, or a mesh of all of them."""

    platform: str
    topology: str
    mesh: tuple[int, ...] = ()


class Placement(NamedTuple):
    """Where arrays lie: a mesh, or one device of a topology."""

    mesh: Mesh | None
    device: object = None

    def shard(self, spec: P = EVERYWHERE) -> jax.sharding.Sharding:
        """Where an array with that spec lies."""
        return NamedSharding(self.mesh, spec) if self.mesh else SingleDeviceSharding(self.device)


def find_missing(platform: str) -> list[str]:
    """The wheels that this environment lacks, or has for another jax."""
    missing = []
    for wheel in WHEELS[platform]:
        try:
            version = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            missing.append(wheel)
            continue
        if wheel.startswith("jax") and version != jax.__version__:
            missing.append(f"{wheel}=={jax.__version__} (is {version})")
    return missing


def environment(platform: str, hosts: int) -> dict[str, str]:
    """The variables of a process that compiles for a platform from a host with so many devices.

    They count only before the first compilation, and differ by platform: each has its own process.
    """
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={hosts}"]
    variables = {"JAX_PLATFORMS": "cpu"}
    if platform == "gpu":
        cuda = _locate("nvidia-cuda-nvcc-cu12", "nvidia/cuda_nvcc")
        # Autotuning times kernels on the device, and there is none.
        flags += ["--xla_gpu_autotune_level=0", f"--xla_gpu_cuda_data_dir={cuda}"]
    if platform == "tpu":
        variables |= {
            "TPU_LIBRARY_PATH": _locate("libtpu", "libtpu/libtpu.so"),
            # Without these libtpu asks the metadata server of Google's cloud, and waits for it.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            # Compiling needs no device, so two such processes are no conflict.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    return variables | {"XLA_FLAGS": " ".join(filter(None, flags))}


def _locate(wheel: str, path: str) -> str:
    return str(importlib.metadata.distribution(wheel).locate_file(path))


def place(target: Target, form: str) -> Placement:
    """The devices of a target, as one device or as the mesh that a form needs."""
    if target.platform == "gpu":
        config = {"target_config": _format(H100), "topology": "1x1x1"}
        topology = topologies.get_topology_desc(target.topology, platform="cuda", **config)
    else:
        topology = topologies.get_topology_desc(target.topology, platform="tpu")
    if not target.mesh:
        return Placement(None, topology.devices[0])
    # Fully sharded: one axis of all devices.
    shape = (int(np.prod(target.mesh)),) if form == "fsdp" else target.mesh
    names = ("x", "y")[: len(shape)]
    devices = topologies.make_mesh(topology, shape, names).devices
    kind = AxisType.Explicit if form == "explicit" else AxisType.Auto
    return Placement(Mesh(devices, names, axis_types=(kind,) * len(shape)))


def _format(message: dict) -> str:
    """A protocol buffer in its text format."""
    fields = []
    for name, value in message.items():
        if isinstance(value, dict):
            fields.append(f"{name} {{ {_format(value)} }}")
        else:
            fields.append(f'{name}: "{value}"' if isinstance(value, str) else f"{name}: {value}")
    return " ".join(fields)
