"""Private attributes that are known to hold a number and nothing about anybody.

After PS3.15 section E.3.10, but only the few that analysis needs: diffusion weighting and
directions, SUV factors, table and rotation speed. All are numbers or code strings.
"""

from __future__ import annotations

# (group, private creator) -> last two digits of the element -> VR.
SAFE: dict[tuple[int, str], dict[int, str]] = {
    (0x7053, "Philips PET Private Group"): {0x00: "DS", 0x09: "DS"},
    (0x2001, "Philips Imaging DD 001"): {0x03: "FL", 0x04: "CS"},
    (0x2005, "Philips MR Imaging DD 001"): {0xB0: "FL", 0xB1: "FL", 0xB2: "FL"},
    (0x0019, "SIEMENS MR HEADER"): {0x0C: "IS", 0x0D: "CS", 0x0E: "FD", 0x27: "FD"},
    (0x0043, "GEMS_PARM_01"): {0x39: "IS"},
    (0x0019, "GEMS_ACQU_01"): {0x23: "DS", 0x24: "DS", 0x27: "DS"},
}
