"""All benchmarks that need nothing but `make setup`: `make bench`."""

from benchmarks import first_token, orchestration

orchestration.main()
first_token.main()
