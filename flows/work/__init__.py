"""What each step of the loop does, as plain functions over a `Workshop`: no Prefect here.

`flows.steps` makes Prefect tasks of them, `flows.improve` puts them in order. Each is idempotent: it looks in the state
for what it would do and does what is missing.
"""
