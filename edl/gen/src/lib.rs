//! Parser and generator.
