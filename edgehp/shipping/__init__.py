"""Shipping: signed bundles, two slots on the device, and what starts from them.

`edgehp.shipping.bundle` makes and verifies bundle files, `edgehp.shipping.slots` installs them;
see ``docs/adr/0008-bundles-and-slots.md`` and ``docs/threat-model.md``.
"""

# Holds the password of encrypted private keys: not an option, which every process could read.
PASSWORD_VARIABLE = "EDGEHP_KEY_PASSWORD"
