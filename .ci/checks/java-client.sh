#!/usr/bin/env bash
# Runs the tests of the Java serializer and deserializers (clients/java) against a real Kafka and a broker that uses it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh
. .ci/neighbours.sh

bash .ci/tools.sh kafka
kafka=${LFS_TEST_KAFKA:-}
if [ -z "$kafka" ]; then
    NEIGHBOURS=$WORK/neighbours
    mkdir "$NEIGHBOURS"
    extra_cleanup=stop_all
    start_kafka
    kafka=$LFS_TEST_KAFKA
fi
dev_options=(--kafka "$kafka")
start_dev
# Build a copy, so that no files of an earlier build are used and none are left in the source tree.
cp -r clients/java "$WORK/java"
rm -rf "$WORK/java/target"
mvn -q -B -f "$WORK/java/pom.xml" verify
ran=$(awk -F'[ ,]+' '/^Tests run:.* Failures: 0, Errors: 0, Skipped: 0,/ { n += $3 } END { print n + 0 }' "$WORK"/java/target/surefire-reports/*.txt)
[ "$ran" -ge 70 ] || { echo "only $ran tests ran"; exit 1; }

# Run the example as an application would: with the module's jar and Kafka's jars on the class path.
mvn -q -B -f "$WORK/java/pom.xml" dependency:build-classpath -DincludeScope=compile -Dmdep.outputFile="$WORK/classpath"
classpath=$(echo "$WORK"/java/target/lfs-broker-kafka-*.jar):$(<"$WORK/classpath")
topic=java-example-$RANDOM$RANDOM
topics() {
    local name
    for name in "$topic" "$topic.lfs-staging"; do
        java -cp "$KAFKA_HOME/*" org.apache.kafka.tools.TopicCommand --bootstrap-server "$kafka" "$@" --topic "$name"
    done
}
topics --create --partitions 1
java -Xmx1g -cp "$classpath" examples/java/LargeValues.java "$topic"
topics --delete
echo "Java client: the example and $ran tests passed against Kafka at $kafka and a running broker"
