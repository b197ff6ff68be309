"""The loop in the car: newest frame -> face -> pose -> filter -> JSON lines, with its faults named.

`sources` opens what delivers frames, `capture` keeps the newest one, `frames` says whether it is a
picture at all, `tracking` where the face is, `filter` smooths rotations, `distraction` is the
example of a function on top, `output`, `watchdog` and `metrics` tell the world, `loop` runs them.
"""
