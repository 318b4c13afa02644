"""One short recipe per training framework; not part of the installed package."""
