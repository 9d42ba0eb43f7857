"""What must survive a crash, be decided and written at once, and be shared by processes of one party: an SQLite file.

It may use the ground (`mpc_fl.files`, `mpc_fl.errors`) alone. Begin with `database`: opening, and transactions;
`chained_rows` adds rows to a table in which an edit is found; `schema` says which tables a file has, `failures` why it
cannot be used, and `taking_over` makes rows of a file that an earlier version kept.
Whoever keeps something states tables and works with rows; the SQL is here, and plain, so that a server database can take
SQLite's place.
"""
