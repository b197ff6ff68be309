"""Weights of head-pose networks for edgehp, which finds them beside this file.

Research, non-commercial use only: see LICENSE and MODEL_CARD.md. There is no code here.
"""
