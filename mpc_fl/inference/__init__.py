"""Encrypted diagnosis: a hospital learns what a model says about its image; nobody else learns image, result or weights.

Two engines with one interface, chosen by `inference.engine` in `diagnosis`: `fast` for convolutional networks, integers on
protocols of our own, and `reference` for all other networks, on CrypTen. `graph` records a network as operations, for both.
`serving` lets a model owner and a dealer stay up for several hospitals. It stands on `sharing`, `audit`, `links`, `learning`
and what is below them; it needs neither `federation` nor `aggregation`.

From a hospital's program to the line where an image is masked:
  parties/hospital.py                             run: the task decides
  hospital_program.py                             diagnose: loads images, connects, writes results
  diagnosis.py                                    request_diagnoses: the engine decides
  fast/diagnosis.py                               ask, diagnose_batches: batch by batch
  fast/online/hospital_session.py                 HospitalSession.diagnose_together: the protocol, its steps and security
  fast/online/evaluation.py                       HospitalEvaluation.hand_over: E = y_C - A, here the image is masked

Begin reading with `diagnosis`, then with the docstring of `fast/online/hospital_session.py`.
"""
