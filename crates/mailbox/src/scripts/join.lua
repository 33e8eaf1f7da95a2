-- join: an access node has members of audiences, or has none any more. Allowed when Redis is full.
--
-- KEYS  an item: nodes, head, queue.
-- ARGV  lease ms; then an item: node, incarnation, number, 1 if the node has members else 0.
-- Reply now, then an item:
--       {'J', epoch (0: no mailbox), newest, chain after it, oldest}
--       {'S'}  a later request of this node was executed before: nothing was changed
--       {'U'}, {'E', text}
--
-- nodes  {s}:g:<app>:<audience>  hash: node -> "incarnation number confirmed_at", in ms. accept reads the names in the
--        script that appends: a message accepted before a join is in the mailbox that the join returns, one accepted
--        after it names the node. A node that has not confirmed for `lease` is removed by the next join of another
--        one; if there is none, all expire. A confirmation within a sixteenth of `lease` leaves the time as it is.

local LEASE = tonumber(ARGV[1])
local JOINED, SUPERSEDED = 'J', 'S'

-- The parts of a field: nil if it is malformed.
local function parse_field(field)
  local incarnation, number, confirmed_at = match(field, '^(%d+) (%d+) (%d+)$')
  return tonumber(incarnation), tonumber(number), tonumber(confirmed_at)
end

-- Removes nodes that have not confirmed for too long, or whose time is ahead of this Redis's.
local function sweep(nodes)
  local fields = call('HGETALL', nodes)
  for i = 1, #fields, 2 do
    local confirmed_at = tonumber(match(fields[i + 1], ' (%d+)$'))
    if not confirmed_at or confirmed_at + LEASE <= NOW or confirmed_at > NOW + LEASE then
      call('HDEL', nodes, fields[i])
    end
  end
end

local function join(key_at, arg_at)
  local nodes, node = KEYS[key_at], ARGV[arg_at]
  local incarnation, number = tonumber(ARGV[arg_at + 1]), tonumber(ARGV[arg_at + 2])
  local stored = call('HGET', nodes, node)
  local incarnation_before, number_before, confirmed_at
  if stored then incarnation_before, number_before, confirmed_at = parse_field(stored) end
  if incarnation_before and (incarnation_before > incarnation
    or incarnation_before == incarnation and number_before > number) then
    return { SUPERSEDED }
  end
  local mailbox = find_mailbox(KEYS[key_at + 1], KEYS[key_at + 2])
  if ARGV[arg_at + 3] == '1' then
    local is_recent = incarnation_before == incarnation and confirmed_at <= NOW
      and NOW - confirmed_at < LEASE / 16
    local time = int(is_recent and confirmed_at or NOW)
    call('HSET', nodes, node, table.concat({ ARGV[arg_at + 1], ARGV[arg_at + 2], time }, ' '))
    if not is_recent then
      call('PEXPIRE', nodes, int(LEASE))
      sweep(nodes)
    end
  elseif stored then
    call('HDEL', nodes, node)
  end
  if not mailbox then return { JOINED, 0, 0, 0, 1 } end
  return { JOINED, mailbox.epoch, mailbox.newest, mailbox.newest_chain, mailbox.oldest }
end

return each(#KEYS / 3, join, 3, 4, 2)
