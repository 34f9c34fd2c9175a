//! The database's clock, read without a statement each time.
//!
//! All replicas use the database's time, so that replicas with wrong clocks agree on leases and expiries. A reading of it
//! stays usable for a while, because this machine's monotonic clock tells how much later it is now.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use time::OffsetDateTime;

/// A reading that is older is renewed in the background. Two clocks that keep good time drift by about 1 ms meanwhile.
const RENEW_AFTER: Duration = Duration::from_secs(20);
/// A reading that is older is not used: the process was stopped, or the database did not answer for long.
const USABLE_FOR: Duration = Duration::from_secs(120);
/// If this machine's two clocks disagree by more about how long ago the reading was, the machine slept or its time was set.
const MAX_DISAGREEMENT: Duration = Duration::from_secs(1);
/// A new reading that is earlier than the time told last by less than this does not turn time back: it stands still instead.
const MAX_STANDSTILL: time::Duration = time::Duration::seconds(1);

/// The last reading of the database's clock, and what tests add to it.
#[derive(Default)]
pub(super) struct Clock {
    reading: Mutex<Reading>,
    is_renewing: AtomicBool,
    advanced_by_ms: AtomicI64,
}

#[derive(Default)]
struct Reading {
    /// The database's time, and this machine's clocks at that moment.
    last: Option<(OffsetDateTime, Instant, SystemTime)>,
    /// The latest time that was told.
    told: Option<OffsetDateTime>,
}

/// What the clock knows.
#[derive(Debug, PartialEq)]
pub(super) enum Known {
    /// The time.
    Time(OffsetDateTime),
    /// The time, by a reading that the caller should renew in the background. No other caller is told so meanwhile.
    TimeToRenew(OffsetDateTime),
    /// No usable reading: ask the database.
    Nothing,
}

impl Clock {
    /// The current time by the database's clock, if a reading is usable.
    pub(super) fn now(&self) -> Known {
        self.at(Instant::now(), SystemTime::now())
    }

    fn at(&self, now: Instant, system_now: SystemTime) -> Known {
        let mut reading = self.reading();
        let Some((database_time, read_at, system_read_at)) = reading.last else { return Known::Nothing };
        let age = now.saturating_duration_since(read_at);
        let system_age = system_now.duration_since(system_read_at).unwrap_or_default();
        if age > USABLE_FOR || age.abs_diff(system_age) > MAX_DISAGREEMENT {
            return Known::Nothing;
        }
        let time = database_time + age;
        let time = match reading.told {
            Some(told) if time < told && told - time < MAX_STANDSTILL => told,
            _ => time,
        };
        reading.told = Some(time);
        let time = in_microseconds(time + self.advanced_by());
        if age > RENEW_AFTER && !self.is_renewing.swap(true, Ordering::AcqRel) {
            Known::TimeToRenew(time)
        } else {
            Known::Time(time)
        }
    }

    /// Takes a reading of the database's clock that was asked for at `asked_at`. The database read its clock between then and
    /// now; the middle is the best guess. Returns the current time.
    pub(super) fn set(&self, database_time: OffsetDateTime, asked_at: Instant) -> OffsetDateTime {
        let now = database_time + asked_at.elapsed() / 2;
        self.reading().last = Some((now, Instant::now(), SystemTime::now()));
        in_microseconds(now + self.advanced_by())
    }

    /// The renewal in the background has ended, whether it succeeded or not.
    pub(super) fn end_renewal(&self) {
        self.is_renewing.store(false, Ordering::Release);
    }

    /// Advances the clock, for tests.
    pub(super) fn advance(&self, by: Duration) {
        let by_ms = i64::try_from(by.as_millis()).expect("a test advances it by less than 292 million years");
        self.advanced_by_ms.fetch_add(by_ms, Ordering::Relaxed);
    }

    fn advanced_by(&self) -> time::Duration {
        time::Duration::milliseconds(self.advanced_by_ms.load(Ordering::Relaxed))
    }

    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A time as PostgreSQL stores it: it keeps microseconds. So an answer shows the same time as the row.
fn in_microseconds(time: OffsetDateTime) -> OffsetDateTime {
    time.replace_microsecond(time.microsecond()).expect("it is one already")
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    /// A clock that was read at time `T`, and the moment of the reading.
    fn read() -> (Clock, Instant, SystemTime) {
        let clock = Clock::default();
        assert_eq!(clock.now(), Known::Nothing);
        let (at, system_at) = (Instant::now(), SystemTime::now());
        clock.reading().last = Some((T, at, system_at));
        (clock, at, system_at)
    }

    #[test]
    fn a_reading_is_used_then_renewed_by_one_caller_then_not_trusted() {
        let (clock, at, system_at) = read();
        let after = |age: Duration| clock.at(at + age, system_at + age);
        assert_eq!(after(RENEW_AFTER), Known::Time(T + RENEW_AFTER));
        assert_eq!(after(RENEW_AFTER * 2), Known::TimeToRenew(T + RENEW_AFTER * 2));
        assert_eq!(after(RENEW_AFTER * 2), Known::Time(T + RENEW_AFTER * 2), "one caller renews it");
        clock.end_renewal();
        assert_eq!(after(RENEW_AFTER * 3), Known::TimeToRenew(T + RENEW_AFTER * 3));
        assert_eq!(after(USABLE_FOR + Duration::from_secs(1)), Known::Nothing);
    }

    #[test]
    fn a_reading_from_before_the_machine_slept_is_not_used() {
        let (clock, at, system_at) = read();
        // The monotonic clock stands still while a machine sleeps.
        assert_eq!(clock.at(at, system_at + Duration::from_secs(3600)), Known::Nothing);
    }

    #[test]
    fn time_stands_still_instead_of_going_back_a_little_but_follows_a_database_whose_clock_was_set() {
        let (clock, at, system_at) = read();
        let second = Duration::from_secs(1);
        assert_eq!(clock.at(at + second, system_at + second), Known::Time(T + second));
        clock.reading().last = Some((T - Duration::from_millis(5), at, system_at));
        assert_eq!(clock.at(at + second, system_at + second), Known::Time(T + second));
        clock.reading().last = Some((T - Duration::from_secs(60), at, system_at));
        assert_eq!(clock.at(at + second, system_at + second), Known::Time(T - Duration::from_secs(59)));
    }

    #[test]
    fn tests_can_advance_it() {
        let (clock, at, system_at) = read();
        clock.advance(Duration::from_secs(31));
        assert_eq!(clock.at(at, system_at), Known::Time(T + Duration::from_secs(31)));
    }
}
