"""Records of patients: images in folders (DICOM and pictures), tables, array archives, synthetic phantoms.

Begin with `loading.load_hospital`, which gives the `Dataset` of one hospital: it finds all records (`image_folders`, `tables`,
`phantoms`), asks whose they are (`patients`), divides the patients over hospitals (`partition`) and reads this hospital's own
(`reading`, `image_files`). `survey` says beforehand what that gives. May use config; nothing of models, privacy or training.
"""
