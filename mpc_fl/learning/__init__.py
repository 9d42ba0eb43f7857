"""What one hospital does by itself: read its patients' records, train on them with privacy, evaluate. No message is sent.

`data` reads and divides records, `models` holds networks and their parameters, `privacy` accounts and makes noise, `training`
makes the steps. Begin with `training.dp_sgd.train_locally`.

May use crypto (its noise is of the project's stream cipher), config and the ground. It knows no other party: nothing of links,
sharing or federation. Opacus, torchvision, scikit-learn, pydicom and Pillow are imported where they are needed, for they
take longer than all the rest.
"""
