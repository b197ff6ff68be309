"""What hangs on the supplies of Jetson boards, and which of them is all of it.

Source: NVIDIA Jetson Linux Developer Guide, "Jetson Orin Series: Power and Thermal", tables of
INA3221 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["describe_rail", "total_of"]

# The input of the whole module: the other rails are behind it and must not be added to it.
_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")
_MEANING = {
    "VDD_IN": "the whole module",
    "POM_5V_IN": "the whole module",
    "VIN": "the whole module",
    "VDD_CPU_GPU_CV": "CPU, GPU, DLA and PVA",
    "VDD_SOC": "memory controller, codecs and the rest of the chip",
    "VDD_GPU_SOC": "GPU and the rest of the chip",
    "VDD_CPU_CV": "CPU, DLA and PVA",
    "VDD_GPU": "GPU",
    "VDD_CPU_SOC_MSS": "CPU, memory controller and the rest of the chip",
    "VIN_SYS_5V0": "the 5 V system supply: memory, storage and what hangs on the carrier board",
    "VDDQ_VDD2_1V8AO": "memory and always-on parts, behind VIN_SYS_5V0",
}


def describe_rail(name: str) -> str:
    """What hangs on a rail, as far as it is documented."""
    return _MEANING.get(name, "not documented here")


def total_of(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The rails that make up the total, and what is inside it or why there is none.

    Only a measured input of the whole module is a total. An AGX Orin has none: its rails overlap
    (``VDDQ_VDD2_1V8AO`` is behind ``VIN_SYS_5V0``) and leave losses out, so that a sum would be an
    invention.
    """
    for name in _INPUTS:
        if name in names:
            return (name,), f"{name}: {describe_rail(name)}"
    listed = "; ".join(f"{n}: {describe_rail(n)}" for n in names)
    return (), f"no total: this board measures no input of the whole module, only {listed}"
