"""All benchmarks that need nothing but `make setup`: `make bench`."""

import asyncio

from benchmarks import first_token, openai_transport, orchestration, ttft

openai_transport.main()
orchestration.main()
asyncio.run(ttft.main([]))
first_token.main()
