"""`python -m moa_ray.cli`: the same as `moa-ray`."""

from moa_ray.cli.main import main

main()
