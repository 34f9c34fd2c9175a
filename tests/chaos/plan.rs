//! What goes wrong, and when: a list that follows from the seed alone, so that the same seed gives the same list.

use std::fmt;
use std::time::Duration;

/// What is killed or stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    /// One replica of the broker.
    Replica(usize),
    /// All replicas at once.
    Replicas,
    /// All of PostgreSQL's processes.
    Postgres,
    /// One of PostgreSQL's processes: the server throws out everybody and recovers.
    Backend,
    Kafka,
    Minio,
    /// Everything at once, as when a machine loses power (but for what its page cache held).
    Everything,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replica(number) => write!(f, "replica-{number}"),
            Self::Replicas => f.write_str("all replicas"),
            Self::Postgres => f.write_str("postgres"),
            Self::Backend => f.write_str("a postgres backend"),
            Self::Kafka => f.write_str("kafka"),
            Self::Minio => f.write_str("minio"),
            Self::Everything => f.write_str("everything"),
        }
    }
}

/// A connection that a proxy stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Link {
    /// Clients to a replica.
    Http(usize),
    /// A replica to PostgreSQL.
    Postgres(usize),
    /// A replica to Kafka.
    Kafka(usize),
    /// A replica to S3.
    S3(usize),
    /// Clients to S3.
    Bytes,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(number) => write!(f, "http-{number}"),
            Self::Postgres(number) => write!(f, "postgres-{number}"),
            Self::Kafka(number) => write!(f, "kafka-{number}"),
            Self::S3(number) => write!(f, "s3-{number}"),
            Self::Bytes => f.write_str("s3-clients"),
        }
    }
}

impl Link {
    /// Every link of so many replicas.
    pub(crate) fn all(replicas: usize) -> Vec<Self> {
        let of = |number| [Self::Http(number), Self::Postgres(number), Self::Kafka(number), Self::S3(number)];
        (0..replicas).flat_map(of).chain([Self::Bytes]).collect()
    }
}

/// What a proxy does to its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Toxic {
    /// Requests vanish; connections hang.
    LostRequests,
    /// Requests arrive, answers vanish.
    LostAnswers,
    /// Connections end in the middle of a request.
    CutRequests(u32),
    /// Connections end in the middle of an answer.
    CutAnswers(u32),
    /// Connections are reset.
    Reset,
    /// Nobody can connect, and whoever was is cut off.
    Refused,
    /// Answers come late.
    Slow(u32),
}

impl Toxic {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::LostRequests => "lost requests",
            Self::LostAnswers => "lost answers",
            Self::CutRequests(_) => "cut requests",
            Self::CutAnswers(_) => "cut answers",
            Self::Reset => "resets",
            Self::Refused => "refusals",
            Self::Slow(_) => "delays",
        }
    }
}

/// One thing that goes wrong, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL, and started again after that time.
    Kill(Target),
    /// SIGSTOP, and SIGCONT after that time.
    Stop(Target),
    Poison(Link, Toxic),
}

/// A fault in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    /// How long after the one before.
    pub(crate) gap: Duration,
    pub(crate) fault: Fault,
    pub(crate) lasts: Duration,
}

/// Servers that a kill of everything ends, besides the replicas.
const SERVERS: usize = 3;

/// How many kills a target counts for.
pub(crate) fn kills_of(target: Target, replicas: usize) -> usize {
    match target {
        Target::Replicas => replicas,
        Target::Everything => replicas + SERVERS,
        _ => 1,
    }
}

/// Draws faults until there are so many kills. Each kind comes once before chance decides, in an order by chance.
pub(crate) fn draw(seed: u64, kills: usize, replicas: usize) -> Vec<Event> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut faults: Vec<Fault> = Vec::new();
    let each = |make: fn(Target) -> Fault| {
        let replicas = (0..replicas).map(Target::Replica);
        replicas.chain([Target::Postgres, Target::Kafka, Target::Minio]).map(make).collect::<Vec<_>>()
    };
    faults.extend(each(Fault::Kill));
    faults.extend(each(Fault::Stop));
    faults.extend([Target::Replicas, Target::Backend].map(Fault::Kill));
    let links = Link::all(replicas);
    for toxic in 0..TOXICS {
        faults.push(Fault::Poison(links[random.usize(..links.len())], toxic_of(toxic, &mut random)));
    }
    random.shuffle(&mut faults);
    let mut events = Vec::new();
    let mut left = kills;
    let mut first = faults.into_iter();
    while left > 0 {
        let fault = first.next().unwrap_or_else(|| chance(&mut random, &links, replicas));
        if let Fault::Kill(target) = fault {
            left = left.saturating_sub(kills_of(target, replicas));
        }
        let gap = Duration::from_millis(random.u64(100..1600));
        events.push(Event { gap, fault, lasts: length(fault, &mut random) });
    }
    events
}

const TOXICS: usize = 7;

fn toxic_of(number: usize, random: &mut fastrand::Rng) -> Toxic {
    match number {
        0 => Toxic::LostRequests,
        1 => Toxic::LostAnswers,
        2 => Toxic::CutRequests(random.u32(0..3000)),
        3 => Toxic::CutAnswers(random.u32(0..3000)),
        4 => Toxic::Reset,
        5 => Toxic::Refused,
        _ => Toxic::Slow(random.u32(50..1500)),
    }
}

fn chance(random: &mut fastrand::Rng, links: &[Link], replicas: usize) -> Fault {
    match random.u32(..100) {
        0..52 => Fault::Kill(match random.u32(..100) {
            0..45 => Target::Replica(random.usize(..replicas)),
            45..53 => Target::Replicas,
            53..63 => Target::Postgres,
            63..72 => Target::Backend,
            // Java takes seconds to be back, and nothing else can be learned meanwhile.
            72..79 => Target::Kafka,
            79..98 => Target::Minio,
            _ => Target::Everything,
        }),
        52..66 => Fault::Stop(match random.u32(..100) {
            0..50 => Target::Replica(random.usize(..replicas)),
            50..68 => Target::Postgres,
            68..82 => Target::Kafka,
            _ => Target::Minio,
        }),
        _ => {
            let toxic = random.usize(..TOXICS);
            Fault::Poison(links[random.usize(..links.len())], toxic_of(toxic, random))
        }
    }
}

/// How long it lasts. A replica stays stopped for longer than its leases live, so that it wakes up as a zombie.
fn length(fault: Fault, random: &mut fastrand::Rng) -> Duration {
    let within = |random: &mut fastrand::Rng, from, to| Duration::from_millis(random.u64(from..to));
    match fault {
        Fault::Kill(Target::Replica(_)) => within(random, 0, 3000),
        Fault::Kill(_) => within(random, 0, 1500),
        Fault::Stop(Target::Replica(_)) => within(random, 500, 9000),
        // Longer than its session lasts: it finds itself fenced when it goes on.
        Fault::Stop(Target::Kafka) => within(random, 2500, 6000),
        Fault::Stop(_) => within(random, 300, 6000),
        Fault::Poison(_, Toxic::Refused) => within(random, 200, 3000),
        Fault::Poison(..) => within(random, 300, 5000),
    }
}
