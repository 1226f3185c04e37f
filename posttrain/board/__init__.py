"""`posttrain board`: look at the stages of a run in the browser.

app.py puts the rooms together and serves them, guard.py stands before every request, stages.py finds and runs the
models. Each room is one file with `room(...)`, which builds its components inside an open `gr.Tab`.
"""
