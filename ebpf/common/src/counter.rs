//! What the probes count beside latencies: everything that did not go into a histogram, each kind
//! on its own.

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal,)*) => {
        /// Number of a counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u64)]
        pub enum Counter {
            $($(#[doc = $doc])* $name,)*
        }

        /// Names of the counters, by number.
        pub const NAMES: &[&str] = &[$($text),*];
    };
}

counters! {
    /// Traced requests that were handed to io_submit.
    Seen = "requests_seen",
    /// Of those: io_submit did not accept them. They are seen again when they are resubmitted.
    NotAccepted = "not_accepted",
    /// Of those: still in flight, as far as the probes know, when their slot was used again.
    Overwritten = "overwritten",
    /// Requests that the device finished before io_submit returned.
    CompletedInSubmit = "completed_in_submit",
    /// Requests whose end at the device is unknown: flushes, holes, data from the page cache. Their
    /// `device` stage lasts until they were reaped.
    DeviceEndUnknown = "device_end_unknown",
    /// Requests of the traced process that carry no tag.
    Untagged = "untagged",
    /// Tagged requests of a lane that is not traced.
    LaneOutOfRange = "lane_out_of_range",
    /// Tagged requests whose operation is none.
    BadOperation = "bad_operation",
    /// Requests beyond the most that is looked at in one io_submit.
    BatchTooLong = "batch_too_long",
    /// Requests that could not be read from the submitter's memory.
    SubmitFault = "submit_fault",
    /// io_submit calls whose requests could not be found again when it returned.
    BatchLost = "batch_lost",
    /// Events that could not be read from the reaper's memory.
    ReapFault = "reap_fault",
    /// Events beyond the most that is looked at in one io_getevents.
    ReapTooLong = "reap_too_long",
    /// Tagged events whose request is not the one in its slot.
    ReapUnmatched = "reap_unmatched",
    /// Tagged events of requests that were submitted while the probes were switched off.
    SubmittedWhileOff = "submitted_while_off",
    /// Requests without a claimed time of publication.
    ClaimMissing = "claim_missing",
    /// Completions by the device for a request that is not the one in its slot.
    StampStale = "stamp_stale",
    /// Completions by the device that carry a tag but belong to another AIO context.
    StampForeign = "stamp_foreign",
    /// Completions by the device whose owner could not be read.
    StampFault = "stamp_fault",
    /// Completions by the device with more chained or merged parts than are followed.
    StampTooLong = "stamp_too_long",
    /// Values too large for a histogram.
    Overflow = "overflow",
    /// Stage `crossing_out` would have been negative: the claimed stamp lies in the future.
    NegativeCrossingOut = "negative_crossing_out",
    /// Stage `device` would have been negative.
    NegativeDevice = "negative_device",
    /// Stage `reap` would have been negative.
    NegativeReap = "negative_reap",
    /// Stage `crossing_in` would have been negative, or the claimed stamp lies in the future.
    NegativeCrossingIn = "negative_crossing_in",
}

/// Number of counters.
pub const COUNTERS: usize = NAMES.len();

/// Copies of every counter, one for each kind of program that may interrupt another; their sum counts.
/// 0: system calls, 1: `block_rq_complete`, 2: `block_bio_complete`.
pub const WRITERS: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_in_order() {
        assert_eq!(NAMES[Counter::Seen as usize], "requests_seen");
        assert_eq!(NAMES[Counter::NegativeCrossingIn as usize], "negative_crossing_in");
        assert_eq!(Counter::NegativeCrossingIn as usize, COUNTERS - 1);
        for (i, name) in NAMES.iter().enumerate() {
            assert!(!NAMES[..i].contains(name), "{name}");
        }
    }
}
