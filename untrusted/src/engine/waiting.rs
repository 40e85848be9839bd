//! Which of a batch's requests the kernel has accepted.

use super::queue::BATCH;

/// Places of a batch, filled from the front and accepted in that order.
#[derive(Debug, Default)]
pub struct Waiting {
    indexes: [usize; BATCH],
    filled: usize,
    accepted: usize,
}

impl Waiting {
    /// Whether requests wait for the kernel to accept them.
    pub const fn is_pending(&self) -> bool {
        self.accepted < self.filled
    }

    /// A place for the request of this index. The batch must not be full.
    pub const fn add(&mut self, index: usize) -> usize {
        if !self.is_pending() {
            (self.filled, self.accepted) = (0, 0);
        }
        let place = self.filled;
        self.indexes[place] = index;
        self.filled += 1;
        place
    }

    /// The places that wait.
    pub const fn places(&self) -> std::ops::Range<usize> {
        self.accepted..self.filled
    }

    /// The first `count` that wait were accepted; answers their indexes.
    pub fn accept(&mut self, count: usize) -> &[usize] {
        let first = self.accepted;
        self.accepted = (first + count).min(self.filled);
        &self.indexes[first..self.accepted]
    }

    /// Takes the first that waits out; answers its index.
    pub fn drop_first(&mut self) -> Option<usize> {
        self.is_pending().then(|| self.accept(1)[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accepted_batch_starts_again_at_the_front() {
        let mut waiting = Waiting::default();
        assert_eq!((waiting.add(4), waiting.add(6), waiting.add(7)), (0, 1, 2));
        assert_eq!(waiting.accept(1), [4]);
        assert_eq!((waiting.places(), waiting.drop_first()), (1..3, Some(6)));
        assert!(waiting.is_pending());
        assert_eq!(waiting.accept(9), [7]);
        assert_eq!((waiting.drop_first(), waiting.is_pending()), (None, false));
        assert_eq!((waiting.add(8), waiting.places()), (0, 0..1));
    }
}
