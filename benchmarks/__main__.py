"""All benchmarks that need nothing but `make setup`: `make bench`."""

from benchmarks import first_token, openai_transport, orchestration

openai_transport.main()
orchestration.main()
first_token.main()
