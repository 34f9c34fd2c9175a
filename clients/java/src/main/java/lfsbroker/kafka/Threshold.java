package lfsbroker.kafka;

import com.fasterxml.jackson.databind.JsonNode;
import java.time.Duration;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.Function;
import java.util.function.LongSupplier;
import org.apache.kafka.common.errors.InterruptException;

/**
 * From how many bytes on a value goes through the broker: what the application set, else what the policy of the topic
 * advises ({@code min_bytes}), and never more than the producer could send inline.
 *
 * <p>The advice is asked for once, and again after a minute behind the application's back: small values go on while the
 * broker is away.
 */
final class Threshold {
    /** The policy's own default. */
    private static final long DEFAULT = 8 << 20;
    /** The first value of a topic waits no longer for advice. */
    private static final Duration PATIENCE = Duration.ofSeconds(2);

    private static final Duration FRESH = Duration.ofMinutes(1);

    private final LfsConfig config;
    private final Function<String, CompletableFuture<JsonNode>> policy;
    private final LongSupplier nanoTime;
    private final ConcurrentHashMap<String, Advice> advices = new ConcurrentHashMap<>();

    /** What was said last, and the question under way. */
    private record Advice(long minBytes, long askAgainAt, CompletableFuture<JsonNode> asked) {}

    Threshold(LfsConfig config, Function<String, CompletableFuture<JsonNode>> policy, LongSupplier nanoTime) {
        this.config = config;
        this.policy = policy;
        this.nanoTime = nanoTime;
    }

    /** The smallest value that an upload to {@code topic} is worth, in bytes. */
    long of(String topic) {
        Long fixed = config.minBytes();
        if (fixed != null) {
            return fixed;
        }
        Advice advice = advices.computeIfAbsent(topic, this::first);
        if (advice.asked() != null ? advice.asked().isDone() : stale(advice)) {
            advice = advices.compute(topic, (same, last) -> next(same, last));
        }
        return Math.min(advice.minBytes(), config.largestInline());
    }

    private Advice first(String topic) {
        CompletableFuture<JsonNode> asked = policy.apply(topic);
        try {
            asked.get(PATIENCE.toMillis(), TimeUnit.MILLISECONDS);
        } catch (InterruptedException error) {
            throw new InterruptException(error);
        } catch (ExecutionException | TimeoutException error) {
            // It stays a question under way, or one without an answer.
        }
        return asked.isDone() ? answered(asked, DEFAULT) : new Advice(DEFAULT, 0, asked);
    }

    private boolean stale(Advice advice) {
        return nanoTime.getAsLong() - advice.askAgainAt() > 0;
    }

    /** Looks again: while this thread waited for its turn another may have asked, and been answered. */
    private Advice next(String topic, Advice last) {
        if (last.asked() == null) {
            return stale(last) ? new Advice(last.minBytes(), 0, policy.apply(topic)) : last;
        }
        return last.asked().isDone() ? answered(last.asked(), last.minBytes()) : last;
    }

    /** Without an answer what was known goes on. */
    private Advice answered(CompletableFuture<JsonNode> asked, long known) {
        long minBytes = asked.isCompletedExceptionally() ? known : asked.join().path("min_bytes").asLong(DEFAULT);
        return new Advice(minBytes, nanoTime.getAsLong() + FRESH.toNanos(), null);
    }
}
