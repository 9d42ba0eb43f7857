"""The report of a finished run: one HTML file that needs nothing from outside, made from the run's files alone.

May use `apps.summaries`, `apps.rows` and what evaluates a classifier; starts nothing and talks to nobody. Importing it loads
matplotlib and Pillow, so it is imported when a report is drawn. Begin with `page.write_report`; a section is a function from
`run_files.Run` to `markup.Markup`, listed in `page`.
"""
