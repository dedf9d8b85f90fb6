"""One PostgreSQL against four shards: the same rows, the same statements.

`models` is the schema, `data` fills it, `grammar` makes statements, and `twins` runs
each on both sides: equal rows, or a refusal by the cluster, and nothing else.
``python -m tests.differential COUNT [SEED]`` searches longer than the suite may.
"""
