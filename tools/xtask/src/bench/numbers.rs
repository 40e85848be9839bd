//! Medians, spreads, and what finished children used.

/// The middle and the edges of a few measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// A quarter lies below.
    pub lower: f64,
    /// Half lies below.
    pub median: f64,
    /// A quarter lies above.
    pub upper: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part| quantile(&values, part);
        Self { min: at(0.0), lower: at(0.25), median: at(0.5), upper: at(0.75), max: at(1.0) }
    }
}

/// The median of `values`; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5)
}

/// The value below which `part` of `sorted` lies, between neighbours in proportion.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = part * last as f64;
    let (low, high) = (at.floor(), at.ceil());
    // Both lie in 0..=last: `part` is within 0..=1.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let (below, above) = (sorted[low as usize], sorted[high as usize]);
    below + (above - below) * (at - low)
}

/// The interval between two of `values` in which their true median lies with at least 95 %,
/// whatever their distribution (order statistics); `None` of fewer than six.
pub fn confidence(values: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    // Outside of the k-th smallest and largest with twice the chance of fewer than k heads.
    let (mut chance, mut outside, mut widest) = (0.5_f64.powi(i32::try_from(count).ok()?), 0.0, 0);
    for k in 1..=count.div_ceil(2) {
        outside += chance;
        if 2.0 * outside > 0.05 {
            break;
        }
        widest = k;
        chance *= (count - k + 1) as f64 / k as f64;
    }
    let lower = widest.checked_sub(1)?;
    Some((sorted[lower], sorted[count - widest]))
}

/// What finished children used, and theirs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Seconds of CPU, user and system.
    pub cpu: f64,
    /// Context switches, wanted and not.
    pub switches: f64,
    /// Bytes they had the kernel write.
    pub written: f64,
}

impl Usage {
    /// Of all children of this process that have been waited for.
    pub fn of_children() -> Self {
        let mut usage = core::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: 1. `usage` points to a live rusage. 2. All zeros is a valid rusage, so it may be
        //    read even if the call failed, which it cannot with these arguments (getrusage(2)).
        let usage = unsafe {
            libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
            usage.assume_init()
        };
        let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
        Self {
            cpu: seconds(usage.ru_utime) + seconds(usage.ru_stime),
            switches: (usage.ru_nvcsw + usage.ru_nivcsw) as f64,
            written: usage.ru_oublock as f64 * 512.0,
        }
    }

    /// What came since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            cpu: self.cpu - before.cpu,
            switches: self.switches - before.switches,
            written: self.written - before.written,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_neighbours() {
        let spread = Spread::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(spread, Spread { min: 1.0, lower: 1.75, median: 2.5, upper: 3.25, max: 4.0 });
        assert_eq!(Spread::of(vec![7.0]).upper, 7.0);
        assert_eq!(median(&[5.0, 1.0, 9.0]), 5.0);
        assert!(median(&[]).is_nan());
    }

    /// Against the binomial distribution: of 7 values the chance that all lie on one side of the
    /// median is 2/128, of 8 that all but one do 18/256.
    #[test]
    fn the_median_lies_between_the_values_that_the_binomial_distribution_says() {
        let values = |count: u32| (1..=count).map(f64::from).collect::<Vec<_>>();
        assert_eq!(confidence(&values(5)), None);
        assert_eq!(confidence(&values(6)), Some((1.0, 6.0)));
        assert_eq!(confidence(&values(7)), Some((1.0, 7.0)));
        assert_eq!(confidence(&values(8)), Some((1.0, 8.0)));
        assert_eq!(confidence(&values(9)), Some((2.0, 8.0)));
        assert_eq!(confidence(&values(20)), Some((6.0, 15.0)));
    }

    #[test]
    fn the_cpu_time_of_a_finished_child_is_counted() {
        let before = Usage::of_children();
        let work = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
        let status = std::process::Command::new("sh").args(["-c", work]).status().unwrap();
        assert!(status.success());
        assert!(Usage::of_children().since(before).cpu > 0.0);
    }
}
