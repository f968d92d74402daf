"""Run an experiment on training: `python -m quantlens.zoo.experiment FILE [--list] [--effects] [--limit N]`.

What is missing is trained, quantized and measured, a piece at a time, in any order of calls and on whatever machine:
weights lie in a folder of each training, measurements in one file of JSON lines. A piece is one training, or one
measurement (weights x method x bits x calibration seed); both are known by what they depend on, so that a change of the
file makes what it concerns anew, and nothing else.

`rows` says what is measured and keeps it, `laboratory` trains and measures, `mediators` are measured of float weights,
`effects` reads the results, `check` trains one again, `command` is what a person calls.
"""
