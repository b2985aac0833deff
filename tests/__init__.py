"""Tests of Tomeforge."""
