"""What the benchmarks share: tables, clocks, watchers of what torch does, options."""
