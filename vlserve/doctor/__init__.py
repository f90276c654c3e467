"""Whether a machine will serve: readings (host, driver, probe), trials (ranks), and what is made of them (checks)."""
