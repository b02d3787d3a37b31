"""What the user writes: the YAML spec, its loader, the DAG that it describes, and the prompts.

Plain Python and pydantic; imports nothing of moa-ray but `errors`.
"""
