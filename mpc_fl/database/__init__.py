"""What must survive a crash, be decided and written at once, and be shared by processes of one party: an SQLite file.

It may use the ground (`mpc_fl.files`, `mpc_fl.errors`) alone. Begin with `database`: opening, and transactions;
`chained_rows` adds rows to a table in which an edit is found; `schema` says which tables a file has, and `failures` why it
cannot be used. Whoever keeps something states tables and works with rows; the SQL is here, and plain, so that a server
database can take SQLite's place.
"""
