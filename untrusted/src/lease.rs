//! When a holder of a lease is asked for it, and when it loses it.
//!
//! Holds: a lease that somebody waits for is asked for after its holder has had it for a while, so
//! that two who want it do not pass it to and fro without getting anything done; a holder that
//! does not answer loses it after a stated time; one that answers that it keeps it is asked again,
//! but not at once. No time is a decision about correctness: whoever loses a lease too early gets
//! errors, never another's data.

use std::time::{Duration, Instant};

/// A holder that keeps a lease is asked again after this.
const KEPT: Duration = Duration::from_secs(1);

/// What leases are held on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms {
    /// A holder is not asked before it has had the lease for this long.
    pub hold: Duration,
    /// A holder that was asked and does not answer within this loses it.
    pub patience: Duration,
}

/// How a lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Not to be asked for before this.
    Held { until: Instant },
    /// Its holder was asked for it.
    Asked { at: Instant },
    /// Taken away.
    Lost,
}

/// What is to be done about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Rest,
    /// Tell the holder.
    Ask,
    /// Take it away.
    Revoke,
}

/// The lease of one host file in one session.
#[derive(Debug)]
pub struct Lease(Standing);

impl Lease {
    /// Granted now.
    #[must_use]
    pub fn granted(now: Instant, terms: &Terms) -> Self {
        Self(Standing::Held { until: now + terms.hold })
    }

    /// A look at it: `wanted` says whether somebody waits.
    pub fn look(&mut self, wanted: bool, now: Instant, terms: &Terms) -> Verdict {
        match self.0 {
            Standing::Held { until } if wanted && now >= until => {
                self.0 = Standing::Asked { at: now };
                Verdict::Ask
            }
            Standing::Asked { .. } if !wanted => {
                self.0 = Standing::Held { until: now };
                Verdict::Rest
            }
            Standing::Asked { at } if now.duration_since(at) >= terms.patience => {
                self.0 = Standing::Lost;
                Verdict::Revoke
            }
            _ => Verdict::Rest,
        }
    }

    /// Its holder keeps it although it was asked.
    pub fn kept(&mut self, now: Instant) {
        if let Standing::Asked { .. } = self.0 {
            self.0 = Standing::Held { until: now + KEPT };
        }
    }

    /// Its holder was asked and has not answered.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        matches!(self.0, Standing::Asked { .. })
    }

    /// It was taken away.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.0 == Standing::Lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms =
        Terms { hold: Duration::from_millis(200), patience: Duration::from_secs(5) };

    #[test]
    fn a_holder_has_its_time_is_asked_once_and_loses_the_lease_if_it_is_silent() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut lease = Lease::granted(begun, &TERMS);
        assert_eq!(lease.look(true, at(199), &TERMS), Verdict::Rest);
        assert_eq!(lease.look(false, at(200), &TERMS), Verdict::Rest);
        assert_eq!(lease.look(true, at(300), &TERMS), Verdict::Ask);
        assert!(lease.is_asked());
        assert_eq!(lease.look(true, at(5299), &TERMS), Verdict::Rest);
        assert_eq!(lease.look(true, at(5300), &TERMS), Verdict::Revoke);
        assert!(lease.is_lost());
        assert_eq!(lease.look(true, at(99_000), &TERMS), Verdict::Rest);
        lease.kept(at(99_000));
        assert!(lease.is_lost(), "what is lost stays lost");
    }

    #[test]
    fn a_holder_that_keeps_it_is_asked_again_a_second_later() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut lease = Lease::granted(begun, &TERMS);
        assert_eq!(lease.look(true, at(200), &TERMS), Verdict::Ask);
        lease.kept(at(4000));
        assert_eq!(lease.look(true, at(4999), &TERMS), Verdict::Rest);
        assert_eq!(lease.look(true, at(5000), &TERMS), Verdict::Ask);
        assert_eq!(lease.look(true, at(9999), &TERMS), Verdict::Rest, "the time begins anew");
    }

    #[test]
    fn a_wish_that_ends_is_forgotten() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut lease = Lease::granted(begun, &TERMS);
        assert_eq!(lease.look(true, at(200), &TERMS), Verdict::Ask);
        assert_eq!(lease.look(false, at(300), &TERMS), Verdict::Rest);
        assert!(!lease.is_asked());
        assert_eq!(lease.look(true, at(9000), &TERMS), Verdict::Ask);
        assert_eq!(lease.look(true, at(9001), &TERMS), Verdict::Rest);
    }
}
