//! How often a failed step is retried, and how long the client waits in between.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;

/// Limits of the retries: by number of attempts, and by total waiting time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// The most attempts, including the first.
    pub attempts: u32,
    /// The wait after the first failure. It doubles with each further failure.
    pub first_wait: Duration,
    /// The longest wait between two attempts. A `Retry-After` header may ask for more.
    pub longest_wait: Duration,
    /// The longest total waiting time of all attempts. A `Retry-After` beyond the rest of it ends the attempts at once.
    pub total_wait: Duration,
}

impl Default for Retry {
    /// Seven attempts over 6 to 13 seconds. A broker restarts in less time, and a user with a wrong address does not wait
    /// long for the error.
    fn default() -> Self {
        Self {
            attempts: 7,
            first_wait: Duration::from_millis(200),
            longest_wait: Duration::from_secs(10),
            total_wait: Duration::from_secs(60),
        }
    }
}

/// An attempt that failed and is repeated.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct RetryEvent<'a> {
    /// Why the attempt failed.
    pub error: &'a Error,
    /// The wait before the next attempt.
    pub wait: Duration,
    /// The longest time that all remaining waits of this step take, including this one. The attempts themselves take time
    /// too.
    pub remaining: Duration,
}

type RetryCallback = dyn Fn(&RetryEvent<'_>) + Send + Sync;

/// The caller's function for retries, if there is one.
#[derive(Clone, Default)]
pub(crate) struct RetryReporter(pub(crate) Option<Arc<RetryCallback>>);

impl fmt::Debug for RetryReporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RetryReporter").field(&self.0.is_some()).finish()
    }
}

impl RetryReporter {
    /// Reports the failed attempt, then waits for `wait`.
    pub(crate) async fn report_and_wait(&self, error: &Error, wait: Duration, backoff: &Backoff) {
        if let Self(Some(callback)) = self {
            callback(&RetryEvent { error, wait, remaining: wait.saturating_add(backoff.longest_remaining_wait()) });
        }
        tokio::time::sleep(wait).await;
    }
}

/// The attempts of one step that are left.
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

    /// The wait before the next attempt, or `None` when no attempt is left.
    pub(crate) fn next(&mut self, retry_after: Option<Duration>) -> Option<Duration> {
        self.next_with_random(retry_after, fastrand::f64())
    }

    /// The same with `random` from 0 to 1 in place of a random number.
    ///
    /// The wait is random between half and all of its length, so that clients that failed together do not retry together.
    fn next_with_random(&mut self, retry_after: Option<Duration>, random: f64) -> Option<Duration> {
        self.failures += 1;
        if self.failures >= self.retry.attempts {
            return None;
        }
        let spread = self.longest_wait_after(self.failures).mul_f64(0.5 + random / 2.0);
        let left = self.retry.total_wait.saturating_sub(self.waited);
        // The server's `Retry-After` is the minimum. All clients got the same value, so up to a quarter of it is added.
        let wait = retry_after.map_or(spread, |retry_after_wait| {
            let delayed = retry_after_wait.max(spread).saturating_add(retry_after_wait.mul_f64(random / 4.0));
            delayed.min(left.max(retry_after_wait))
        });
        if wait > left {
            return None;
        }
        self.waited += wait;
        Some(wait)
    }

    /// The longest wait after this number of failures, if the server asks for no longer one.
    fn longest_wait_after(&self, failures: u32) -> Duration {
        let doubled = self.retry.first_wait.saturating_mul(1 << failures.saturating_sub(1).min(30));
        doubled.min(self.retry.longest_wait)
    }

    /// The longest total wait of the attempts that are left.
    fn longest_remaining_wait(&self) -> Duration {
        let waits = (self.failures + 1..self.retry.attempts).map(|failures| self.longest_wait_after(failures));
        let total = waits.fold(Duration::ZERO, Duration::saturating_add);
        total.min(self.retry.total_wait.saturating_sub(self.waited))
    }

    /// Resets attempts and waiting time after progress. The caller must limit how often that happens.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
        self.waited = Duration::ZERO;
    }
}

/// Parses `Retry-After` as whole seconds, the only form that the broker sends.
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
        total_wait: Duration::from_secs(3),
    };

    #[test]
    fn waits_double_up_to_the_limit_and_end_with_the_attempts() {
        let mut backoff = Backoff::new(RETRY);
        let waits: Vec<_> = std::iter::from_fn(|| backoff.next_with_random(None, 1.0)).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [100, 200, 300, 300]);
    }

    #[test]
    fn the_remaining_wait_is_the_sum_of_the_waits_that_are_left() {
        let mut backoff = Backoff::new(RETRY);
        assert_eq!(backoff.longest_remaining_wait(), Duration::from_millis(100 + 200 + 300 + 300));
        backoff.next_with_random(None, 1.0);
        assert_eq!(backoff.longest_remaining_wait(), Duration::from_millis(200 + 300 + 300));
        let short = Retry { total_wait: Duration::from_millis(250), ..RETRY };
        assert_eq!(Backoff::new(short).longest_remaining_wait(), Duration::from_millis(250));
    }

    #[test]
    fn jitter_takes_up_to_half() {
        assert_eq!(Backoff::new(RETRY).next_with_random(None, 0.0), Some(Duration::from_millis(50)));
        for _ in 0..100 {
            let wait = Backoff::new(RETRY).next(None).unwrap();
            assert!((Duration::from_millis(50)..=Duration::from_millis(100)).contains(&wait), "{wait:?}");
        }
    }

    #[test]
    fn retry_after_is_the_minimum_and_the_total_wait_the_maximum() {
        let mut backoff = Backoff::new(RETRY);
        assert_eq!(backoff.next_with_random(Some(Duration::from_secs(2)), 0.0), Some(Duration::from_secs(2)));
        assert_eq!(backoff.next_with_random(Some(Duration::from_secs(2)), 0.0), None);
    }

    #[test]
    fn clients_with_the_same_retry_after_do_not_retry_together() {
        let retry = Retry { total_wait: Duration::from_secs(60), ..RETRY };
        let wait =
            |retry_after_wait, random| Backoff::new(retry).next_with_random(Some(Duration::from_secs(retry_after_wait)), random);
        assert_eq!(wait(8, 0.0), Some(Duration::from_secs(8)));
        assert_eq!(wait(8, 1.0), Some(Duration::from_secs(10)));
        // The random extra does not exceed the total waiting time.
        assert_eq!(wait(60, 1.0), Some(Duration::from_secs(60)));
        // A huge value does not overflow.
        assert_eq!(wait(u64::MAX, 1.0), None);
    }

    #[test]
    fn a_reset_restores_attempts_and_waiting_time() {
        let mut backoff = Backoff::new(Retry { attempts: 2, total_wait: Duration::from_millis(150), ..RETRY });
        assert!(backoff.next_with_random(None, 1.0).is_some());
        assert!(backoff.next_with_random(None, 1.0).is_none());
        backoff.reset();
        assert_eq!(backoff.next_with_random(None, 1.0), Some(Duration::from_millis(100)));
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
