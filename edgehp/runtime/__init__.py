"""From frames to head poses: photos and films (`edgehp predict`), and the loop in the car.

`sources` opens what delivers frames and `detection` finds faces in them. `predict` gives the poses
of every face and `drawing` draws them. For the car, `capture` keeps the newest frame, `frames` says
whether it is a picture at all, `tracking` follows one face, `engine` opens a failed engine again,
`filter` smooths rotations, and `loop` runs them. `records` describes what both write, `output`
where it goes.
"""
