"""What the versions of torch differ in, and a run of the tests with each."""
