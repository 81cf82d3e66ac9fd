#!lua
-- CREATE: make the head with epoch 0, or return the one that exists (core.conversation.create).
-- KEYS 1 meta
-- ARGV 1 user  2 metadata (JSON)  3 generation
-- ->   {1 if made else 0, head}
-- @include now
-- @include head
local head = read_head()
if head then return {0, listed(head)} end
local ts = text(now)
head = {owner = '', epoch = '0', seq = '0', batch = '', cursor = '0', position = '0', done = '0', base = '0',
  status = 'running', nonce = '', updated = ts, strikes = '0', struck = '0', strike_at = '0', user = ARGV[1],
  generation = ARGV[3], created = ts, metadata = ARGV[2],
  halted = '0', asks = '0', archived = '0', archived_epoch = '0', manifest = ''}
write_head(head)
return {1, listed(head)}
