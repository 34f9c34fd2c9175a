//! How often and how patiently a failed step is tried again.

use std::time::Duration;

/// Bounds of trying again: by number, and by the time spent waiting in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Most attempts, the first one included.
    pub attempts: u32,
    /// The wait after the first failure; it doubles with each further one.
    pub first_wait: Duration,
    /// The longest wait that doubling leads to. A `Retry-After` may ask for more.
    pub longest_wait: Duration,
    /// The longest time spent waiting over all attempts. A `Retry-After` that exceeds what is left ends the attempts at once.
    pub all_waits: Duration,
}

impl Default for Retry {
    /// Seven attempts over 6 to 13 seconds: longer than a broker needs to restart, shorter than a person waits for a typing error.
    fn default() -> Self {
        Self {
            attempts: 7,
            first_wait: Duration::from_millis(200),
            longest_wait: Duration::from_secs(10),
            all_waits: Duration::from_secs(60),
        }
    }
}

/// The attempts of one step as they are used up.
#[derive(Debug)]
pub(crate) struct Backoff {
    retry: Retry,
    failures: u32,
    waited: Duration,
}

impl Backoff {
    pub(crate) fn new(retry: Retry) -> Self {
        Self { retry, failures: 0, waited: Duration::ZERO }
    }

    /// How long to wait before the next attempt, or none when there is none.
    pub(crate) fn next(&mut self, retry_after: Option<Duration>) -> Option<Duration> {
        self.next_with(retry_after, fastrand::f64())
    }

    /// The same with `chance` from 0 to 1 in place of randomness.
    ///
    /// Waits are spread over their upper half, so that clients that failed together do not come back together.
    fn next_with(&mut self, retry_after: Option<Duration>, chance: f64) -> Option<Duration> {
        self.failures += 1;
        if self.failures >= self.retry.attempts {
            return None;
        }
        let doubled = self.retry.first_wait.saturating_mul(1 << (self.failures - 1).min(30));
        let spread = doubled.min(self.retry.longest_wait).mul_f64(0.5 + chance / 2.0);
        let left = self.retry.all_waits.saturating_sub(self.waited);
        // What the server asked for is a floor, and it asked all of them for the same: a quarter of it sets them apart.
        let wait = retry_after.map_or(spread, |asked| {
            let late = asked.max(spread).saturating_add(asked.mul_f64(chance / 4.0));
            late.min(left.max(asked))
        });
        if wait > left {
            return None;
        }
        self.waited += wait;
        Some(wait)
    }

    /// Starts anew after progress. What counts as progress must be bounded by the caller, else nothing is.
    pub(crate) fn progressed(&mut self) {
        self.failures = 0;
        self.waited = Duration::ZERO;
    }
}

/// Reads `Retry-After` in its form of whole seconds, the only one that the contract uses.
pub(crate) fn retry_after(headers: &reqwest::header::HeaderMap) -> Option<Duration> {
    let value = headers.get(reqwest::header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETRY: Retry = Retry {
        attempts: 5,
        first_wait: Duration::from_millis(100),
        longest_wait: Duration::from_millis(300),
        all_waits: Duration::from_secs(3),
    };

    #[test]
    fn waits_double_up_to_the_longest_and_end_with_the_attempts() {
        let mut backoff = Backoff::new(RETRY);
        let waits: Vec<_> = std::iter::from_fn(|| backoff.next_with(None, 1.0)).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [100, 200, 300, 300]);
    }

    #[test]
    fn jitter_takes_up_to_half() {
        assert_eq!(Backoff::new(RETRY).next_with(None, 0.0), Some(Duration::from_millis(50)));
        for _ in 0..100 {
            let wait = Backoff::new(RETRY).next(None).unwrap();
            assert!((Duration::from_millis(50)..=Duration::from_millis(100)).contains(&wait), "{wait:?}");
        }
    }

    #[test]
    fn retry_after_is_a_floor_and_the_total_a_ceiling() {
        let mut backoff = Backoff::new(RETRY);
        assert_eq!(backoff.next_with(Some(Duration::from_secs(2)), 0.0), Some(Duration::from_secs(2)));
        assert_eq!(backoff.next_with(Some(Duration::from_secs(2)), 0.0), None);
    }

    #[test]
    fn clients_that_were_sent_away_together_do_not_come_back_together() {
        let retry = Retry { all_waits: Duration::from_secs(60), ..RETRY };
        let wait = |asked, chance| Backoff::new(retry).next_with(Some(Duration::from_secs(asked)), chance);
        assert_eq!(wait(8, 0.0), Some(Duration::from_secs(8)));
        assert_eq!(wait(8, 1.0), Some(Duration::from_secs(10)));
        // What can be waited for is not put off beyond all patience.
        assert_eq!(wait(60, 1.0), Some(Duration::from_secs(60)));
        // Whatever a server makes of it.
        assert_eq!(wait(u64::MAX, 1.0), None);
    }

    #[test]
    fn progress_gives_attempts_and_time_back() {
        let mut backoff = Backoff::new(Retry { attempts: 2, all_waits: Duration::from_millis(150), ..RETRY });
        assert!(backoff.next_with(None, 1.0).is_some());
        assert!(backoff.next_with(None, 1.0).is_none());
        backoff.progressed();
        assert_eq!(backoff.next_with(None, 1.0), Some(Duration::from_millis(100)));
    }

    #[test]
    fn retry_after_is_read_as_seconds_only() {
        let mut headers = reqwest::header::HeaderMap::new();
        assert_eq!(retry_after(&headers), None);
        headers.insert("retry-after", "7".parse().unwrap());
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(7)));
        headers.insert("retry-after", "Fri, 21 Nov 2026 07:28:00 GMT".parse().unwrap());
        assert_eq!(retry_after(&headers), None);
    }
}
