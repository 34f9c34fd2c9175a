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
 * The smallest value that is uploaded instead of sent inline: {@code lfs.min.bytes} if the application sets it. Otherwise
 * {@code min_bytes} of the topic's policy, but at most the size that the producer can send inline.
 *
 * <p>The policy is cached and refreshed each minute in the background. So small values can be sent while the broker is down.
 */
final class UploadThreshold {
    /** The default of {@code min_bytes} in a policy. */
    private static final long DEFAULT_MIN_BYTES = 8 << 20;
    /** The longest time that the first value of a topic waits for the policy. */
    private static final Duration FIRST_REQUEST_TIMEOUT = Duration.ofSeconds(2);

    private static final Duration REFRESH_INTERVAL = Duration.ofMinutes(1);

    private final LfsConfig config;
    private final Function<String, CompletableFuture<JsonNode>> policy;
    private final LongSupplier nanoTime;
    private final ConcurrentHashMap<String, CachedPolicy> policies = new ConcurrentHashMap<>();

    /** The last known value, and the request that is in flight, or null. */
    private record CachedPolicy(long minBytes, long refreshAtNanos, CompletableFuture<JsonNode> request) {}

    UploadThreshold(LfsConfig config, Function<String, CompletableFuture<JsonNode>> policy, LongSupplier nanoTime) {
        this.config = config;
        this.policy = policy;
        this.nanoTime = nanoTime;
    }

    /** The size in bytes from which values for uploads to {@code topic} are uploaded. */
    long minBytes(String topic) {
        Long configured = config.minBytes();
        if (configured != null) {
            return configured;
        }
        CachedPolicy cached = policies.computeIfAbsent(topic, this::load);
        if (cached.request() != null ? cached.request().isDone() : isStale(cached)) {
            cached = policies.compute(topic, this::refresh);
        }
        return Math.min(cached.minBytes(), config.inlineLimitBytes());
    }

    private CachedPolicy load(String topic) {
        CompletableFuture<JsonNode> request = policy.apply(topic);
        try {
            request.get(FIRST_REQUEST_TIMEOUT.toMillis(), TimeUnit.MILLISECONDS);
        } catch (InterruptedException error) {
            throw new InterruptException(error);
        } catch (ExecutionException | TimeoutException error) {
            // The default applies until a request succeeds.
        }
        return request.isDone() ? fromResponse(request, DEFAULT_MIN_BYTES) : new CachedPolicy(DEFAULT_MIN_BYTES, 0, request);
    }

    private boolean isStale(CachedPolicy cached) {
        return nanoTime.getAsLong() - cached.refreshAtNanos() > 0;
    }

    /** Checks again under the map's lock: another thread may have sent the request or stored its response meanwhile. */
    private CachedPolicy refresh(String topic, CachedPolicy last) {
        if (last.request() == null) {
            return isStale(last) ? new CachedPolicy(last.minBytes(), 0, policy.apply(topic)) : last;
        }
        return last.request().isDone() ? fromResponse(last.request(), last.minBytes()) : last;
    }

    /** Keeps the last known value if the request failed. */
    private CachedPolicy fromResponse(CompletableFuture<JsonNode> request, long lastMinBytes) {
        long minBytes =
                request.isCompletedExceptionally() ? lastMinBytes : request.join().path("min_bytes").asLong(DEFAULT_MIN_BYTES);
        return new CachedPolicy(minBytes, nanoTime.getAsLong() + REFRESH_INTERVAL.toNanos(), null);
    }
}
