"""Records of patients: images in folders (PNG, JPEG, DICOM), tables, array archives, synthetic phantoms.

Begin with `loading.load_hospital`, which gives the `Dataset` of one hospital: it finds all records (`image_files`, `tables`,
`phantoms`), divides the patients over hospitals (`partition`) and reads this hospital's own. May use config;
nothing of models, privacy or training.
"""
