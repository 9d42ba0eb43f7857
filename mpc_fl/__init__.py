"""mpc-fl: hospitals learn together and diagnose together on secret-shared tensors.

Twelve packages; each uses only those before it:

    database      what must survive a crash and be shared by processes, in chained rows
    config        one validated YAML file
    crypto        secrets, randomness, fixed-point numbers, certificates
    links         frames over mutually authenticated streams between parties
    learning      what one hospital does alone: data, models, privacy, training
    audit         openings recorded, signed by all, checked by anybody
    sharing       secret shares, the dealer, secure sums, and the one way out of the secret domain
    aggregation   who is in a sum, and the bound on what a hospital may add to it
    federation    one round of training, both sides
    inference     encrypted diagnosis; needs neither federation nor aggregation
    evidence      what runs show of patients, measured beside what is proved
    apps          command line, runs, reports, benchmarks; `parties/` beside it holds one short program per role

The ground under all of them: `errors`, `roles`, `files`, `progress`, `compatibility`. Begin with `federation` for training
and with `inference` for diagnosis; each package says itself where to begin.
"""

__version__ = "0.1.0"
